"""Labels that a model draws from its own predictions: the gradients of their loss have the Fisher matrix for a moment.

That is the curvature which K-FAC is about. The gradients of the text's own labels give another matrix, the empirical
Fisher, in which the tokens that the model predicts badly count most (Kunstner et al., arXiv 1905.12558).
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

# Of logits that exist at one time: 512 MiB in float32 for a vocabulary of 128,000.
TOKENS_PER_CHUNK = 1024
IGNORED_LABEL = -100  # transformers' own: such a token is no target
LOSS_PER = 1024  # tokens, whatever their number is


def counted_predictions(
    batch: Mapping[str, Tensor], logits: Float[Tensor, "batch tokens vocabulary"]
) -> Bool[Tensor, "batch tokens"]:
    """Of which tokens the prediction of the next one counts.

    Args:
        batch: May have labels, which only say which tokens count, or an attention_mask, 1 where a token does, each
            (batch, tokens).
        logits: Of the batch. Only their shape and device matter.

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

    Args:
        logits: Of a forward with gradients, any floating dtype; computed in float32.
        counted: True where a token's prediction counts.
        seed: Of the draws, which touch no other random numbers.

    Returns:
        The sum over the counted tokens, over `LOSS_PER`, float32. So it is about as large as a mean, but squares of
        gradients of several batches add up token by token: with a mean those of a short batch would count for more.

    Examples:
        >>> logits = torch.tensor([[[0.0, 50.0], [50.0, 0.0]]], requires_grad=True)  # it is certain of both
        >>> sampled_loss(logits, torch.tensor([[True, True]]), seed=1)
        tensor(0., grad_fn=<DivBackward0>)
    """
    generator = torch.Generator(logits.device).manual_seed(seed)
    chosen = logits[counted]  # (counted tokens, vocabulary)
    total = logits.new_zeros((), dtype=torch.float32)
    for some in torch.split(chosen, TOKENS_PER_CHUNK):
        scores = some.float()
        labels = torch.multinomial(scores.detach().softmax(-1), 1, generator=generator).squeeze(1)
        total = total + functional.cross_entropy(scores, labels, reduction="sum")
    return total / LOSS_PER
