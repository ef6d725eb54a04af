"""Cohort surveys at a site: rounded counts of its index, masked, before there is a study."""
