"""What is summed for the layers of one window, and how ranks keep it in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from thanos_lightning.collect.hidden_states import HiddenStates
from thanos_lightning.collect.inputs import InputStatistics
from thanos_lightning.collect.outputs import OutputGradients
from thanos_lightning.layers.targets import Layer
from thanos_lightning.ranks.access import ParameterAccess
from thanos_lightning.ranks.talk import Failures, PruningError


class Statistics:
    """The statistics of one window: those of the layers' inputs, and those of their outputs and of blocks if wanted.

    `gradients` says whether the gradients at outputs are summed. The calls of `blocks` are recorded, as many as the
    training of a block in `block_steps` steps takes.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        access: ParameterAccess,
        *,
        gradients: bool = False,
        blocks: Mapping[str, nn.Module] | None = None,
        block_steps: int = 0,
    ) -> None:
        self._access = access
        self.failures = Failures(access)
        self.inputs = InputStatistics(layers, self.failures)
        self.gradients = OutputGradients(layers, self.failures) if gradients else None
        self.states = HiddenStates(blocks, block_steps, self.failures) if blocks else None
        # batch, place in it, and whether it holds NaN: a bool on the batch's device, which the host reads at the end
        self._nan: list[tuple[str, str, Tensor]] = []

    def start(self, module: nn.Module, *, of_training: bool) -> None:
        """Add the hooks. `of_training` says whether the training runs the backwards."""
        self.inputs.start(module)
        if self.gradients is not None:
            self.gradients.start(of_training=of_training)
        if self.states is not None:
            self.states.start()

    def stop(self) -> None:
        """Remove the hooks. The sums stay."""
        for part in (self.inputs, self.gradients, self.states):
            if part is not None:
                part.stop()

    def look_for_nan(self, batch: Any, name: str) -> None:
        """Look for NaN in a batch that is counted, for `refuse_nan`. The host waits for no device."""
        with self.failures.catching():
            self._nan += [(name, place, tensor.isnan().any()) for place, tensor in _floating(batch, "")]

    def refuse_nan(self) -> None:
        """Refuse sums that NaN in a batch has reached. All ranks must call it.

        A batch may hold NaN where no layer reads it, such as in a label that the loss leaves out.

        Raises:
            PruningError: On all ranks, with the first batch that holds NaN, or with an error that a hook has kept.
        """
        with self.failures.catching():
            first: dict[str, str] = {}  # place -> the first batch with NaN there: one of these places may be harmless
            for name, place, has_nan in self._nan:
                if place not in first and has_nan:
                    first[place] = name
            if first:
                found = ", ".join(f"{name} holds NaN{place}" for place, name in first.items())
                for layer, accumulator in self.inputs.accumulators.items():
                    if accumulator.triangle.diagonal().isnan().any():
                        raise PruningError(
                            f"{found}, and so do the inputs of layer {layer}: replace NaN in "
                            "the data by numbers, or leave such samples out"
                        )
        self.failures.raise_together()

    def seconds(self) -> float:
        """Return the time that summing has taken."""
        of_outputs = 0.0 if self.gradients is None else self.gradients.stopwatch.seconds()
        return self.inputs.stopwatch.seconds() + of_outputs

    def gather_states(self) -> list[dict[str, Any] | None]:
        """Return the states that a checkpoint of this rank has to keep. All ranks must call it.

        The list has an entry for each rank: its `InputStatistics.state` with its `gradients` (the sums in
        `OutputGradients`), or None if another rank keeps it. If rank 0 writes for all ranks, it receives the states of
        all. Sums are sent one by one, because a device may lack the memory for all of them.
        """
        access, sums = self._access, {} if self.gradients is None else self.gradients.sums
        gradients = {name: squares.to("cpu", copy=True) for name, squares in sums.items()}
        state = {"gradients": gradients, **self.inputs.state()}
        if access.world_size == 1 or access.saves_every_rank:
            return [state if rank == access.rank else None for rank in range(access.world_size)]
        states: list[dict[str, Any] | None] = []
        for rank, outline in enumerate(access.gather(apply_to_collection(state, Tensor, Tensor.to, "meta"))):
            tensors = state if rank == access.rank else outline
            sent = apply_to_collection(tensors, Tensor, partial(self._send_to_rank_0, rank))
            states.append(sent if access.rank in (0, rank) else None)
        return states

    def _send_to_rank_0(self, source: int, tensor: Tensor) -> Tensor | None:
        received = self._access.send(tensor, source=source, destination=0, shape=tensor.shape)
        return None if received is None else received.cpu()

    def load(self, states: Sequence[Mapping[str, Any] | None]) -> None:
        """Continue from this rank's share of what `gather_states` returned, under any number of ranks.

        Raises:
            MisconfigurationException: If a different number of ranks wrote the states, and each rank only its own.
        """
        of_rank = states[self._access.rank :: self._access.world_size]  # any rank may add up any sums
        written = [state for state in of_rank if state is not None]
        if len(written) < len(of_rank):
            raise MisconfigurationException(
                f"the checkpoint was written by {len(states)} ranks while statistics were collected, each its own "
                f"part, and {self._access.world_size} resume it: run `thanos-lightning reshard` on it first"
            )
        if written:
            self.inputs.load_states(written)
        gradients: dict[str, Tensor] = {}
        for state in written:
            for name, squares in state.get("gradients", {}).items():
                gradients[name] = gradients[name] + squares if name in gradients else squares
        if self.gradients is not None:
            self.gradients.load(gradients)


def _floating(batch: Any, place: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the floating-point tensors in a batch, each with its place: ` in batch["key"][0]`, or nothing."""
    if isinstance(batch, Tensor) and batch.is_floating_point():
        yield place and f" in batch{place}", batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from _floating(value, f"{place}[{key!r}]")
    elif isinstance(batch, (list, tuple)):
        for number, value in enumerate(batch):
            yield from _floating(value, f"{place}[{number}]")
