"""A loss on labels that the model samples from its own predictions. Its gradients' second moment is the Fisher matrix.

K-FAC approximates this matrix. The text's own labels would give another one, the empirical Fisher, in which the tokens
that the model predicts badly count most (Kunstner et al., arXiv 1905.12558).
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

# Tokens whose logits become float32 at one time: 500 MiB for a vocabulary of 128,000.
TOKENS_PER_CHUNK = 1024
IGNORED_LABEL = -100  # transformers' label for a token that is no target
LOSS_PER = 1024  # tokens; the loss is divided by this fixed number


def counted_predictions(
    batch: Mapping[str, Tensor], logits: Float[Tensor, "batch tokens vocabulary"]
) -> Bool[Tensor, "batch tokens"]:
    """Mark the tokens whose next-token prediction counts.

    A prediction counts if the next token's label is not -100; without labels, if the attention_mask is 1 for both
    tokens; without both, always. Labels and mask are (batch, tokens). Of the logits, only the shape and the device
    matter.

    Examples:
        >>> counted_predictions({"attention_mask": torch.tensor([[1, 1, 0]])}, torch.zeros(1, 3, 2))
        tensor([[ True, False, False]])
    """
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    counted = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    if labels is not None:
        counted[:, :-1] = (labels[:, 1:] != IGNORED_LABEL).to(counted.device)
    elif mask is not None:
        counted[:, :-1] = (mask[:, :-1].bool() & mask[:, 1:].bool()).to(counted.device)
    counted[:, -1] = False  # nothing follows
    return counted


def sampled_loss(
    logits: Float[Tensor, "batch tokens vocabulary"], counted: Bool[Tensor, "batch tokens"], *, seed: int
) -> Float[Tensor, ""]:
    """Cross entropy against one label for each token, drawn from the model's own distribution.

    The logits are of a forward with gradients, in any floating dtype. The loss is the sum over the counted tokens,
    divided by `LOSS_PER`, in float32. It is about as large as a mean. Unlike a mean, it gives the tokens of short and
    long batches the same weight when squared gradients of batches are added. The seed is for a generator of its own, so
    that no other random numbers change.
    """
    generator = torch.Generator(logits.device).manual_seed(seed)
    chosen = logits[counted]  # (counted tokens, vocabulary)
    total = logits.new_zeros((), dtype=torch.float32)
    for chunk in torch.split(chosen, TOKENS_PER_CHUNK):
        labels = torch.multinomial(chunk.detach().float().softmax(-1), 1, generator=generator).squeeze(1)
        part = checkpoint(_cross_entropies, chunk, labels, use_reentrant=False, preserve_rng_state=False)
        total = total + part  # the backward keeps no float32 copy
    return total / LOSS_PER


def _cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float(), labels, reduction="sum")
