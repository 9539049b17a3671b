"""Prune language models with the Thanos solver while they are fine-tuned with Lightning."""
