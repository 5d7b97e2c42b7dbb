"""Evaluation: what a classifier's probabilities are worth."""
