"""The paper's table at this scale: `ld-evaluate --config configs/benchmark_ld.yaml`."""
