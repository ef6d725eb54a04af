"""A hospital's side: data, training and what may leave."""
