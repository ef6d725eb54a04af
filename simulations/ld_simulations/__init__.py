"""Demo hospitals, the tiny base model and whole federations on one machine."""
