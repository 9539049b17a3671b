"""Losses by which a pruned causal language model learns from the dense one, as pure functions.

The loss on logits is from Hinton et al. (2015). All losses are computed in float32, whatever the inputs are. Padding
does not count.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from thanos_lightning.collect.outputs import TOKENS_PER_CHUNK
from thanos_lightning.collect.tokens import IGNORED_LABEL
from thanos_lightning.lm.pretrained import load_tokenizer, torch_dtype

_RENAMED = 0.01  # fraction of the tokens above which it is another vocabulary

START = "start"


@dataclass(frozen=True)
class Distillation:
    """The teacher of a model that is pruned, and the weights of the losses in their sum.

    Args:
        teacher: "start" is the model as it was when the training began. Any other value is a hub name or local folder.
        cross_entropy: Weight of the loss on the text.
        logits: Weight of KL(teacher ‖ student), the divergence of the next-token distributions.
        dtype: Dtype of the teacher: "bfloat16", "float32" or "float16".

    Raises:
        ValueError: If a weight is negative, if `logits` is 0, or if the dtype is unknown.

    Examples:
        >>> Distillation(logits=0.5).teacher
        'start'
    """

    teacher: str = START
    cross_entropy: float = 1.0
    logits: float = 1.0
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name in ("cross_entropy", "logits"):
            weight = getattr(self, name)
            if not (isinstance(weight, int | float) and math.isfinite(weight) and weight >= 0):
                raise ValueError(f"{name} is {weight!r}: give a weight ≥ 0")
        if not self.logits:
            raise ValueError(
                "logits is 0, so that nothing would be learnt from the teacher: give a weight above 0, or leave the "
                "distillation out"
            )
        torch_dtype(self.dtype)


def check_teacher(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raise ValueError if the vocabularies differ in size, or if a model does more to its logits than its head."""
    of_student, of_teacher = (model.config.get_text_config().vocab_size for model in (student, teacher))
    if of_student != of_teacher:
        named = f"the teacher {teacher.name_or_path!r}" if teacher.name_or_path else "the teacher"
        raise ValueError(
            f"{named} has a vocabulary of {of_teacher:,} tokens and the model one of {of_student:,}: take a teacher "
            "with the model's tokenizer (where only their padding differs, resize_token_embeddings of one)"
        )
    for model in (student, teacher):
        _check_head(model)


def other_vocabulary(model: str, teacher: str, vocab_size: int) -> str | None:
    """Why the tokens of a teacher are not the model's, which an equal number of tokens would hide.

    `model` and `teacher` are names for `load_tokenizer`. None if the tokens are the same but for a few renamed ones, as
    chat models have them, or if either tokenizer cannot be found and read.
    """
    try:
        of_model, of_teacher = (load_tokenizer(name).get_vocab() for name in (model, teacher))
    except Exception:  # readers of many formats raise many kinds of errors, none a reason not to train
        return None
    # Without tokenizer files, transformers makes up a tokenizer of some special tokens for most kinds of models.
    if min(len(of_model), len(of_teacher)) < vocab_size / 2:
        return None
    words = {index: word for word, index in of_teacher.items()}
    other = {word: index for word, index in of_model.items() if words.get(index) != word}
    if len(other) <= _RENAMED * len(of_model):
        return None
    word, index = min(other.items(), key=lambda item: item[1])
    return (
        f"the teacher {teacher!r} has another vocabulary than the model: {len(other):,} of {len(of_model):,} tokens "
        f"are others, such as {index}, which is {word!r} to the model and {words.get(index)!r} to the teacher: take a "
        "teacher with the model's tokenizer"
    )


def _check_head(model: PreTrainedModel) -> None:
    """Check that the head turns the last hidden states into the logits that the model itself gives."""
    device = next(model.parameters()).device
    tokens = torch.arange(min(4, model.config.get_text_config().vocab_size), device=device).unsqueeze(0)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            whole = model(input_ids=tokens, use_cache=False).logits.float()
            parts = _head(model)(model.base_model(input_ids=tokens, use_cache=False).last_hidden_state).float()
    finally:
        model.train(training)
    if not (whole - parts).abs().max() <= 1e-2 * whole.abs().max():
        raise ValueError(
            f"{type(model).__name__} does more to its logits than its head (it scales or caps them), which "
            "distillation in chunks leaves out: call the functions of thanos_lightning.lm.distillation on its logits, "
            "in your own training_step"
        )


def _head(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    head: Callable[[Tensor], Tensor] | None = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings, so that it is no causal language model")
    return head


def num_chunks(tokens: int) -> int:
    """Return how many chunks of tokens go through a head if none is larger than ``TOKENS_PER_CHUNK``.

    Examples:
        >>> num_chunks(1024), num_chunks(1025)
        (1, 2)
    """
    return max(1, -(-tokens // TOKENS_PER_CHUNK))


def distil(
    student: PreTrainedModel, teacher: PreTrainedModel, batch: Mapping[str, Tensor], chunks: int | None = None
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Run both models on a batch, and return the cross entropy and the divergence of ``head_losses``.

    Logits never exist for more than `TOKENS_PER_CHUNK` tokens at a time. Beside the student's activations, memory holds
    the last hidden states of the teacher.

    Args:
        student: The model that gets gradients.
        teacher: The model without gradients. It is in evaluation mode, as `from_pretrained` leaves it.
        batch: `input_ids`, `attention_mask` and `labels`, each int64 of shape (batch, tokens), and what else the
            model's forward takes.
        chunks: In how many chunks the tokens go through the heads; None takes `num_chunks`. If calling a head gathers
            it (ZeRO-3, FSDP2), all ranks must give the same number: the largest that any rank needs.
    """
    inputs: dict[str, Any] = {name: value for name, value in batch.items() if name != "labels"}
    inputs["use_cache"] = False
    with torch.no_grad():
        of_teacher = teacher.base_model(**inputs).last_hidden_state
    of_student = student.base_model(**inputs).last_hidden_state
    heads = _head(student), _head(teacher)
    return head_losses(of_student, of_teacher, *heads, batch["labels"], batch.get("attention_mask"), chunks)


def divergence(
    student: Float[Tensor, "*tokens vocabulary"],
    teacher: Float[Tensor, "*tokens vocabulary"],
    counted: Bool[Tensor, "*tokens"] | None = None,
) -> Float[Tensor, ""]:
    """The Kullback-Leibler divergence KL(teacher ‖ student) of the next-token distributions, a mean over tokens.

    The logits of ``TOKENS_PER_CHUNK`` tokens at a time are converted to float32, and again in the backward pass.

    The teacher's logits get no gradient. `counted` says which tokens count; None counts all.

    Raises:
        ValueError: If shapes differ.
    """
    _check_logits(student, teacher)
    both = (student, teacher.detach())
    rows = [logits.flatten(end_dim=-2) if counted is None else logits[counted.bool()] for logits in both]
    parts = zip(*(torch.split(tensor, TOKENS_PER_CHUNK) for tensor in rows), strict=True)
    sums = [checkpoint(_divergences, *part, use_reentrant=False) for part in parts]
    return torch.stack(sums).sum() / max(1, len(rows[0]))


def head_losses(
    student: Float[Tensor, "batch tokens hidden"],
    teacher: Float[Tensor, "batch tokens hidden"],
    student_head: Callable[[Tensor], Tensor],
    teacher_head: Callable[[Tensor], Tensor],
    labels: Int64[Tensor, "batch tokens"],
    counted: Bool[Tensor, "batch tokens"] | None = None,
    chunks: int | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Cross entropy and ``divergence`` from the last hidden states, without ever holding the logits of all tokens.

    Return both: the cross entropy as a mean over targets, and the divergence as a mean over the tokens that count.

    Args:
        student: The student's last hidden states, which its head takes.
        teacher: The teacher's last hidden states, which get no gradient.
        student_head: Maps hidden states (tokens, hidden) to logits (tokens, vocabulary).
        teacher_head: The same for the teacher.
        labels: Labels as transformers takes them. They are shifted here, and -100 is no target.
        counted: Which tokens count for the divergence; None counts all.
        chunks: See ``distil``.

    Raises:
        ValueError: If the heads have different vocabularies.
    """
    targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL).flatten()  # the next label of each token
    weights = torch.ones_like(labels, dtype=torch.bool) if counted is None else counted.bool()
    rows = (student.flatten(end_dim=1), teacher.detach().flatten(end_dim=1), targets, weights.flatten())
    chunks = chunks or num_chunks(len(targets))

    def losses(hidden: Tensor, of_teacher: Tensor, some_targets: Tensor, some_weights: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            wanted = teacher_head(of_teacher)
        logits = student_head(hidden)
        _check_logits(logits, wanted)
        entropy = functional.cross_entropy(logits.float(), some_targets, ignore_index=IGNORED_LABEL, reduction="sum")
        return entropy, _divergences(logits, wanted, some_weights)

    parts = zip(*(torch.tensor_split(tensor, chunks) for tensor in rows), strict=True)
    sums = [checkpoint(losses, *part, use_reentrant=False) for part in parts]
    entropies, divergences = zip(*sums, strict=True)
    return _mean(entropies, targets != IGNORED_LABEL), _mean(divergences, weights)


def _mean(sums: Sequence[Tensor], counted: Tensor) -> Tensor:
    return torch.stack(list(sums)).sum() / counted.sum().clamp(min=1)


def _check_logits(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's logits have shape {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}: take a "
            "teacher with the student's tokenizer and vocabulary"
        )


def _divergences(student: Tensor, teacher: Tensor, counted: Tensor | None = None) -> Tensor:
    learnt, wanted = (logits.float().log_softmax(-1) for logits in (student, teacher))
    if counted is None:
        return functional.kl_div(learnt, wanted, log_target=True, reduction="sum")
    # where() instead of indexing, for which the host would wait at each chunk.
    of_tokens = functional.kl_div(learnt, wanted, log_target=True, reduction="none").sum(-1)
    return torch.where(counted, of_tokens, 0).sum()
