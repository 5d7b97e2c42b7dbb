"""Benchmarks of tl_keras and its baselines, measured in the same run. The results are in `results/`."""
