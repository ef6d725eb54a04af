"""Fetches scans from the hospital's PACS into a quarantine folder."""
