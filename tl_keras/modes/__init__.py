"""One file a mode, read from top to bottom like a recipe."""
