"""Names of the files in a folder of evaluation scans."""

SCANS = "scans.csv"
"""Table with a row for each scan: `patient`, `input` (a path relative to the table) and each attribute."""
TRUTH = "held_out.json"
"""For simulated patients: their edits, and where the true counterfactual of each lies."""
