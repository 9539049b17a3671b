"""Plans which layers are pruned at which optimizer step, and how sparse each becomes."""
