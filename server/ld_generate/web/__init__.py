"""`ld-generate serve`: a local web page that asks one release about one scan at a time."""
