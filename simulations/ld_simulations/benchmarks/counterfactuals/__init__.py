"""Are the counterfactuals true? Every way of editing, judged on scans that nobody trained on."""
