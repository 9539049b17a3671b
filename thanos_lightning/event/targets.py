"""The targets of a training: layers with their final patterns, and what goes with them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

from thanos_lightning.checkpoints.format import Size
from thanos_lightning.layers.blocks import Block
from thanos_lightning.layers.experts import Mixture
from thanos_lightning.layers.targets import Layer
from thanos_lightning.ranks.view import View
from thanos_lightning.solver import Channels, Experts, Pattern


@dataclass(frozen=True)
class Targets:
    """The layers to prune, their final patterns, and what goes with them."""

    # by name; the down layer stands for a feed-forward block that loses channels, and for an expert that may go
    layers: Mapping[str, Layer]
    final: Mapping[str, Pattern]  # by name of a layer, its pattern at the end
    # down layer -> the weights and biases that compute its inputs: rows i, width + i, … are of channel i. Where experts
    # go, they go as a whole
    coupled: Mapping[str, Sequence[View]] = field(default_factory=dict)
    # the same for down layers whose channels are permuted before the first event
    reordered: Mapping[str, Sequence[View]] = field(default_factory=dict)
    keeps_order: str | None = None  # why no channels are permuted; None if some are, or it was not asked for
    mixtures: Mapping[str, Mixture] = field(default_factory=dict)  # by name, those of which experts may go

    @property
    def masked(self) -> dict[str, View]:
        """All that may get a mask, by name: the layers, and what goes with them."""
        return {**self.layers, **{part.name: part for parts in self.coupled.values() for part in parts}}

    def check_zeros(self, name: str, zeros: int) -> None:
        """Refuse a down layer of which more channels than asked for were zero before the training."""
        pattern, width = self.final[name], self.layers[name].cols
        if isinstance(pattern, Experts):
            return
        assert isinstance(pattern, Channels)
        if zeros > pattern.num_columns(width):
            raise ValueError(
                f"{zeros} of {width} channels of {name} are zero already, and {pattern.num_columns(width)} are to be "
                "pruned in each block: raise the sparsity"
            )

    def trainable(self, blocks: Mapping[str, Block]) -> dict[str, Block]:
        """The blocks that keep all experts. In another block, a copied router would not know which experts went."""
        experts = {mixture.experts for mixture in self.mixtures.values()}
        return {name: block for name, block in blocks.items() if experts.isdisjoint(block.module.modules())}

    def without_order(self, held: Set[str]) -> Targets:
        """The same, where down layers that have zeros already keep the order of their channels."""
        if not self.reordered or held.isdisjoint(self.reordered):
            return self
        reordered = {name: parts for name, parts in self.reordered.items() if name not in held}
        return replace(
            self, reordered=reordered, keeps_order=None if reordered else "the down layers are pruned already"
        )

    def after(self, dense: Size) -> tuple[Size, int]:
        """What an export has at the end, and how many of its weights are not 0, by what it has without pruning."""
        taken_out = zeros = 0
        for name, layer in self.layers.items():
            pattern = self.final[name]
            coupled = sum(part.rows * part.cols for part in self.coupled.get(name, ()))
            if isinstance(pattern, Experts):  # the down layer stands for its expert
                mixture = next(iter(self.mixtures.values()))
                share = pattern.num_experts(mixture.size, mixture.groups) / mixture.size
                taken_out += round(share * (layer.rows * layer.cols + coupled))
            elif isinstance(pattern, Channels):
                taken_out += pattern.num_columns(layer.cols) * (layer.rows + coupled // layer.cols)
            else:
                zeros += pattern.num_pruned(layer.rows, layer.cols)
        left = dense.weights - taken_out
        return Size(left, dense.bytes_each), left - zeros

    @property
    def in_words(self) -> str | None:
        """How many channels or experts are kept at the end; None if neither are units of pruning."""
        for name in self.coupled:
            pattern, width = self.final[name], self.layers[name].cols
            if isinstance(pattern, Experts):
                mixture = next(iter(self.mixtures.values()))
                kept = mixture.size - pattern.num_experts(mixture.size, mixture.groups)
                return (
                    f"{kept:,} of {mixture.size:,} experts stay in each of {len(self.mixtures)} mixtures, "
                    f"{mixture.top_k} for each token"
                )
            assert isinstance(pattern, Channels)
            kept = width - pattern.num_columns(width)
            return f"{kept:,} of {width:,} channels stay in each of {len(self.coupled)} feed-forward blocks"
        return None

    @property
    def order_in_words(self) -> str | None:
        """Whether channels are permuted; None if it was not asked for."""
        if self.keeps_order is not None:
            return f"channels are not permuted: {self.keeps_order}"
        if not self.reordered:
            return None
        return f"{len(self.reordered)} feed-forward blocks: channels are permuted so that N:M loses less"


def home_of(name: str, models: Collection[str]) -> str:
    """The outermost of the models that a layer is in; "" if it is in none, or if all is one model."""
    return min((model for model in models if name.startswith(f"{model}.") or not model), key=len, default="")
