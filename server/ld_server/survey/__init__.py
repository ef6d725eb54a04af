"""Cohort surveys at the engineer's side: questions, the list of keys, the sum. No server runs for them."""
