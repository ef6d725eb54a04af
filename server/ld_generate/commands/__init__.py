"""One module a subcommand of `ld-generate`. Importing them imports no model library."""
