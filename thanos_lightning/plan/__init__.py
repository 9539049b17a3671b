"""Numbers in, a list of windows out."""
