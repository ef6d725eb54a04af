"""`ld-generate serve`: a local web page that edits one scan at a time with one release."""
