"""What a pruned model learns from the dense one: losses between two causal language models, as pure functions.

Hinton et al. (2015) for logits; SquareHead (Kurtic et al., arXiv 2310.06927) for hidden states. All are computed in
float32 whatever the inputs are, and padding doesn't count.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

# Of logits that exist at one time: 512 MiB in float32 for a vocabulary of 128,000, and as much for the teacher's.
TOKENS_PER_CHUNK = 1024
_IGNORED_LABEL = -100  # transformers' own: such a token is no target


def divergence(
    student: Float[Tensor, "*tokens vocabulary"],
    teacher: Float[Tensor, "*tokens vocabulary"],
    temperature: float = 1.0,
    counted: Bool[Tensor, "*tokens"] | None = None,
) -> Float[Tensor, ""]:
    """The Kullback-Leibler divergence of the student's next-token distributions from the teacher's, a mean over tokens.

    Times temperature², so that gradients keep their size (Hinton et al., section 2.1). Logits are turned to float32
    ``TOKENS_PER_CHUNK`` at a time, and again in the backward.

    Args:
        student: Logits, any floating dtype.
        teacher: Logits; no gradient goes there.
        temperature: Both logits are divided by it.
        counted: Which tokens count; None counts all.

    Raises:
        ValueError: If shapes differ, or the temperature isn't positive.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> float(divergence(logits, logits))
        0.0
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's logits have shape {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}: take a "
            "teacher with the student's tokenizer and vocabulary"
        )
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: give a number > 0, such as 1.0")
    rows = _counted_rows(counted, student, teacher.detach())
    sums = [
        checkpoint(_divergences, *some, temperature, use_reentrant=False)
        for some in zip(*(torch.split(one, TOKENS_PER_CHUNK) for one in rows), strict=True)
    ]
    return torch.stack(sums).sum() / max(1, len(rows[0]))


def squarehead(
    student: Sequence[Float[Tensor, "*tokens hidden"]],
    teacher: Sequence[Float[Tensor, "*tokens hidden"]],
    counted: Bool[Tensor, "*tokens"] | None = None,
) -> Float[Tensor, ""]:
    """How far the student's hidden states are from the teacher's, over how large these are, in each layer alike.

    That is ‖student - teacher‖² / ‖teacher‖², over the tokens that count and the hidden size; of layers it is the mean,
    so that it means the same for models of any depth.

    Args:
        student: Hidden states after each layer.
        teacher: Those of the teacher; no gradient goes there.
        counted: Which tokens count; None counts all.

    Raises:
        ValueError: If the numbers of layers or the shapes differ.

    Example:
        >>> states = [torch.ones(1, 3, 4), 2 * torch.ones(1, 3, 4)]
        >>> float(squarehead([torch.zeros(1, 3, 4), states[1]], states))
        0.5
    """
    if len(student) != len(teacher) or not student:
        raise ValueError(
            f"the student has {len(student)} hidden states and the teacher {len(teacher)}: take a teacher of the "
            "student's depth, and at least one layer"
        )
    parts = []
    for layer, (own, other) in enumerate(zip(student, teacher, strict=True)):
        if own.shape != other.shape:
            raise ValueError(
                f"hidden states {layer} of the student have shape {tuple(own.shape)} and the teacher's "
                f"{tuple(other.shape)}: take a teacher of the student's width"
            )
        mine, its = (one.float() for one in _counted_rows(counted, own, other.detach()))
        parts.append((mine - its).square().sum() / its.square().sum().clamp(min=torch.finfo(its.dtype).tiny))
    return torch.stack(parts).mean()


def head_losses(
    student: Float[Tensor, "batch tokens hidden"],
    teacher: Float[Tensor, "batch tokens hidden"],
    student_head: Callable[[Tensor], Tensor],
    teacher_head: Callable[[Tensor], Tensor],
    labels: Int64[Tensor, "batch tokens"],
    temperature: float = 1.0,
    counted: Bool[Tensor, "batch tokens"] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Cross entropy and ``divergence`` from the last hidden states, without ever holding the logits of all tokens.

    Args:
        student: Its last hidden states, what its head takes.
        teacher: The teacher's; no gradient goes there.
        student_head: From hidden states (tokens, hidden) to logits (tokens, vocabulary).
        teacher_head: The teacher's.
        labels: As transformers takes them: those of a token are shifted here, and -100 is no target.
        temperature: See ``divergence``.
        counted: Which tokens count for the divergence; None counts all.

    Returns:
        The cross entropy, a mean over targets, and the divergence, a mean over the tokens that count.
    """
    targets = functional.pad(labels[:, 1:], (0, 1), value=_IGNORED_LABEL).flatten()
    weights = torch.ones_like(labels, dtype=torch.bool) if counted is None else counted.bool()
    rows = (student.flatten(end_dim=1), teacher.detach().flatten(end_dim=1), targets, weights.flatten())

    def losses(hidden: Tensor, its_hidden: Tensor, some_targets: Tensor, some_weights: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            its_logits = teacher_head(its_hidden)
        logits = student_head(hidden)
        entropy = functional.cross_entropy(logits.float(), some_targets, ignore_index=_IGNORED_LABEL, reduction="sum")
        return entropy, _divergences(logits[some_weights], its_logits[some_weights], temperature)

    entropies, divergences = zip(
        *(
            checkpoint(losses, *some, use_reentrant=False)
            for some in zip(*(torch.split(one, TOKENS_PER_CHUNK) for one in rows), strict=True)
        ),
        strict=True,
    )
    num_targets, num_counted = (targets != _IGNORED_LABEL).sum(), weights.sum()
    return (
        torch.stack(entropies).sum() / num_targets.clamp(min=1),
        torch.stack(divergences).sum() / num_counted.clamp(min=1),
    )


def _counted_rows(counted: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as (tokens that count, features)."""
    if counted is None:
        return tuple(one.flatten(end_dim=-2) for one in tensors)
    return tuple(one[counted.bool()] for one in tensors)


def _divergences(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    own, other = ((logits.float() / temperature).log_softmax(-1) for logits in (student, teacher))
    return temperature**2 * functional.kl_div(own, other, log_target=True, reduction="sum")
