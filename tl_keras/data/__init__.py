"""Data: sources of labelled images, their splits, decoding and resizing."""
