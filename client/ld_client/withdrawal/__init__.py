"""A patient withdraws consent: removal from the store, the studies concerned, and what exact forgetting would cost."""
