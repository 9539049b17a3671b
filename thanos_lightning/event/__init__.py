"""One window at its event: statistics are summed, layers are solved, and weights are written."""
