"""One layer, one process: tensors in, a pruned layer out."""
