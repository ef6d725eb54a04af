"""Privacy audits at a site: membership inference, canaries, copies."""
