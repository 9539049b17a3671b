"""What layers are pruned on: moments of their inputs, and of the loss's gradients at their outputs."""
