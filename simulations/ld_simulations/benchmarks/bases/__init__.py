"""Every base that loads, in one suite."""
