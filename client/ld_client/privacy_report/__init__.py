"""`ld-client privacy-report`: the report that a data protection officer reads and signs."""
