"""What a training did: as data, as tables, and as a picture."""
