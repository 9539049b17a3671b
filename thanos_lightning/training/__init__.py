"""Fits pruning into Lightning's training: zeros that hold, other callbacks, and Lightning's private names."""
