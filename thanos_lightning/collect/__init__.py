"""Collects what layers are pruned on: second moments of their inputs and of the gradients at their outputs."""
