"""What Lightning's training must know of pruning."""
