"""Scripts that measure this project beside its peers in one run. Their results are in `results/`."""
