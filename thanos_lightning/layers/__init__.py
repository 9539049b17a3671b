"""Finds the weight matrices of a model that can be pruned."""
