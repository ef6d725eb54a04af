"""A site in a deployed study: kit, keys, approvals, node, audit log, releases."""
