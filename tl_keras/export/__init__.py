"""Export: a classifier as a SavedModel for TensorFlow Serving, compared with what was evaluated."""
