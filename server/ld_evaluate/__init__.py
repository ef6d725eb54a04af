"""`ld-evaluate`: how true a release's counterfactuals are, judged on scans that it was not trained on."""
