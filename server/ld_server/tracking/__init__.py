"""Where a run's numbers go besides its log: `rounds.csv`, TensorBoard, and by option MLflow and W&B."""
