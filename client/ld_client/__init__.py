"""A hospital's side of a federation: data, training, policy, privacy, deployment."""
