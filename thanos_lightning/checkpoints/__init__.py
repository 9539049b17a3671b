"""What is on disk: written, read, verified."""
