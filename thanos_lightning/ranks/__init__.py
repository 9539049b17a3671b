"""Which rank holds which piece of a parameter, how to read, write and mask the piece, and how ranks agree."""
