"""Probes: scikit-learn classifiers on embeddings; selection, fitting, and conversion to TensorFlow."""
