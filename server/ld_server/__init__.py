"""The central side: strategy, aggregation, checkpoints, releases and counterfactuals."""
