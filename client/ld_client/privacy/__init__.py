"""Privacy at the site: DP training, the ledger, masked sums, the attacks, the report."""
