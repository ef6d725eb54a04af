"""`ld-evaluate-privacy`: what differential privacy, the ledger, secure sums and the audit cost and bring."""
