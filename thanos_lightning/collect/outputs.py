"""Mean squares of the loss's gradient at a layer's outputs: how strongly the loss reacts to an error there.

Together with the Hessian H of the inputs they form a Kronecker-factored curvature of the loss (K-FAC, Martens and
Grosse, arXiv 1503.05671), of whose output factor they are the diagonal. Let g_i be the mean square of the gradient at
output i. Then a change ΔW of a layer raises the loss by ½ Σ_i g_i ‖ΔW_i X‖² to second order, so that outputs and layers
become comparable.

The loss is used as it is. If it is a mean over a batch's tokens, as in most trainings, the tokens of a short batch
count for more, in these moments as in the training.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from thanos_lightning.layers.targets import Layer
from thanos_lightning.ranks.access import ParameterAccess
from thanos_lightning.ranks.talk import Failures
from thanos_lightning.report.stopwatch import Stopwatch

# Tokens whose logits become float32 at one time: 500 MiB for a vocabulary of 128,000.
TOKENS_PER_CHUNK = 1024
LOSS_PER = 1024  # tokens; the loss is divided by this fixed number
# Added to the weights of a layer's outputs, times their mean: few tokens say little about an output that hardly matters
# to them.
_FLOOR = 0.01
# Times a loss before a backward: the gradient of a mean over thousands of tokens underflows in float16.
LOSS_SCALE = 2.0**14


class _Attached(torch.autograd.Function):
    """Makes a layer's output depend on a leaf as well, so that a backward to the leaf reaches every layer's output.

    The output stays the same tensor, because torch refuses models that write in place on a view made here.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, leaf: Tensor) -> Tensor:
        ctx.device = leaf.device  # with offloading, this is not the output's device
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.zeros((), device=ctx.device)


class OutputGradients:
    """Sums squared gradients at the outputs of layers over the tokens of every backward, by hooks.

    `sums` has the sums by layer, (rows,).

    Gradients that are not finite are left out; they occur when a gradient scaler is about to skip the step. Padding
    needs no mask: its gradients are 0 if the loss ignores it. `failures` keeps an error of a hook while other ranks
    would wait. Nothing is counted after an error. `stopwatch` measures the time that summing takes.
    """

    def __init__(self, layers: Mapping[str, Layer], failures: Failures | None = None) -> None:
        self.sums: dict[str, Tensor] = {}
        self.stopwatch = Stopwatch()
        self._failures = failures or Failures()
        self._layers = layers
        self._hooks = ExitStack()
        self._leaf: Tensor | None = None
        self._is_counting = True
        self._unscale: float | Tensor = 1.0  # undoes the loss scale in a gradient

    def start(self, *, of_training: bool = True) -> None:
        """Add the hooks. `of_training` says whether the training runs the backwards; else `backward` does."""
        if not of_training:
            device = next(iter(self._layers.values())).parameter.device
            self._leaf = torch.zeros((), device=device, requires_grad=True)
        for name, layer in self._layers.items():
            for module in layer.modules:
                self._hooks.enter_context(module.register_forward_hook(partial(self._watch, name)))

    def begin(self, loss_scale: float | Tensor = 1.0) -> None:
        """Begin a training batch whose loss is multiplied by `loss_scale` before the backward."""
        self._unscale = 1 / loss_scale

    def stop(self) -> None:
        """Remove the hooks."""
        self._leaf = None
        self._hooks.close()

    def backward(self, loss: Tensor, *, counts: bool) -> None:
        """Run a backward that stops at the layers' outputs, and touches no gradient of a parameter.

        The loss is of a forward since `start`. If `counts` is False, the gradients are left out of the sums.
        """
        assert self._leaf is not None
        self._is_counting, self._unscale = counts, 1 / LOSS_SCALE
        (LOSS_SCALE * loss).backward(inputs=[self._leaf])  # type: ignore[no-untyped-call]

    def _watch(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        # torch forgets the hooks of a view that a model writes on, and the outputs of many layers are views. This one
        # has the same memory, but is no view to torch.
        output = torch.ops.aten._unsafe_view(output, output.shape)
        if self._leaf is not None and torch.is_grad_enabled():
            output = _Attached.apply(output, self._leaf)  # type: ignore[no-untyped-call, unused-ignore]
        # Activation checkpointing runs two forwards and differentiates one. A hook on the other's output never fires.
        if output.requires_grad:
            output.register_hook(partial(self._add, name))  # type: ignore[no-untyped-call]
        return output

    @torch.no_grad()
    def _add(self, name: str, gradient: Tensor) -> None:
        if self._is_counting and self._failures.error is None:
            with self._failures.catching(), self.stopwatch.running(gradient.device):
                self._sum(name, gradient)

    def _sum(self, name: str, gradient: Tensor) -> None:
        rows = gradient.reshape(-1, gradient.shape[-1])
        if name not in self.sums:
            self.sums[name] = torch.zeros(self._layers[name].rows, dtype=torch.float32, device=rows.device)
        sums = self.sums[name] = self.sums[name].to(rows.device)
        # A float32 copy, because a norm along the tokens reads memory against its order, ten times as slowly.
        squares = rows.to(torch.float32, copy=True).mul_(self._unscale).square_().sum(0)
        # torch.where, because an `if` would make the host wait for the device
        sums += torch.where(squares.isfinite(), squares, 0)

    def load(self, sums: Mapping[str, Tensor]) -> None:
        """Continue from the sums of a checkpoint."""
        self.sums = {name: one.to(self._layers[name].parameter.device, copy=True) for name, one in sums.items()}

    def divide(self, steps: int) -> None:
        """Turn sums over this many steps into means over them."""
        for one in self.sums.values():
            one /= steps

    def weights(self, access: ParameterAccess) -> dict[str, Float[Tensor, " rows"]]:
        """How much an error at each output counts: its sum on all ranks, plus a hundredth of the layer's mean.

        All ranks must call it. Layers without any gradient are missing.
        """
        found = [
            self.sums[name].cpu() if name in self.sums else torch.zeros(layer.rows, dtype=torch.float32, device="cpu")
            for name, layer in self._layers.items()
        ]
        parts = torch.split(access.total(torch.cat(found)), [len(one) for one in found])
        return {name: part + _FLOOR * part.mean() for name, part in zip(self._layers, parts, strict=True) if part.any()}


def sampled_loss(
    logits: Float[Tensor, "batch tokens vocabulary"], counted: Bool[Tensor, "batch tokens"], *, seed: int
) -> Float[Tensor, ""]:
    """Cross entropy against one label for each token, drawn from the model's own distribution.

    The second moment of its gradients is the Fisher matrix, which K-FAC approximates. The text's own labels would give
    the empirical Fisher, in which the tokens that the model predicts badly count most (Kunstner et al., arXiv
    1905.12558).

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
