"""Cost and utility of differential privacy and secure aggregation, and attacks on trained models."""
