"""A study in deployment: provisioning, the gate, the services, releases."""
