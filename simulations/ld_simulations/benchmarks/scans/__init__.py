"""Reading scans: what is read, at which cost, and whether it arrives right."""
