"""Probes: scikit-learn's classifiers on embeddings, chosen, fitted, and folded into TensorFlow."""
