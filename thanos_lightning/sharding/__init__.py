"""Who holds which piece of a parameter: how to read, write and mask it, and how ranks agree."""
