"""Statistics of predictions: pure functions of NumPy arrays."""
