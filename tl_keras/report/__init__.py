"""The report: one file that shows how good a classifier is, how sure that is, and what it gets wrong."""
