"""The matrices of a model that can be pruned: found, counted, and what is special about each kind."""
