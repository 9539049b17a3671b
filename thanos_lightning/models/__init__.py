"""What of a model is a matrix to prune."""
