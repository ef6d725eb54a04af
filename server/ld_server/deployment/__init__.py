"""A deployed study: provisioning, fleet proxy, SuperLink, release service."""
