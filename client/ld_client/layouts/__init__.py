"""Importers of public layouts: each reads scans and tables as they come and makes a site's table of visits."""
