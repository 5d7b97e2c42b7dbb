"""Evaluation of a classifier: metrics, tables, slices, robustness, comparison and leaks."""
