"""A deployed study on one machine: real processes, real keys, loopback."""
