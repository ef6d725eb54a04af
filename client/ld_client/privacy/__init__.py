"""Differential privacy at the site, its ledger, and masked sums."""
