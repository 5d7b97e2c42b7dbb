"""Audit of data: duplicates, data leakage, label errors, outliers and distribution shift."""
