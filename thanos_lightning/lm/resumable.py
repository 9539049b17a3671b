"""A DataLoader that resumes in the middle of an epoch, with any number of processes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sized
from typing import Any

from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, SequentialSampler


class EpochSampler(DistributedSampler[int]):
    """Indices in an order that depends on the seed and the epoch alone, from a given position on.

    If `shuffle` is False, all epochs have the order of the data set.
    """

    skip = 0  # number of this process's leading indices to leave out

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(super().__iter__(), self.skip, None)


class ResumableDataLoader(DataLoader[Any]):
    """A DataLoader whose state is how far it got, for Lightning to keep in its checkpoints.

    The order of the samples depends on the seed and the epoch only. The state counts the samples that were handed out
    in all processes together. Samples that worker processes have only prefetched do not count. A resumed run continues
    with the next sample and does not fetch the earlier ones. The batch size and the number of processes may change; the
    position is exact if the count is a multiple of the new number of processes.

    The sampler shares the samples among `num_replicas` processes. Lightning leaves it alone, as a `DistributedSampler`.
    Lightning sets the epoch; in a loop of your own call `loader.sampler.set_epoch(epoch)`.

    Args:
        dataset: A map-style data set.
        num_replicas: Number of processes that share the samples.
        rank: Rank of this process.
        shuffle: Whether to permute, differently in each epoch.
        seed: Seed of the permutations, the same on all ranks.
        sampler: Lightning gives a `SequentialSampler` here for `overfit_batches`. It works like shuffle=False.
        **kwargs: The other arguments of `DataLoader`.

    Raises:
        ValueError: If another kind of sampler is given, because its order is unknown.

    Examples:
        >>> loader = ResumableDataLoader(range(6), batch_size=2, seed=0)
        >>> first, *rest = [batch.tolist() for batch in loader]
        >>> _ = next(iter(loader))
        >>> resumed = ResumableDataLoader(range(6), batch_size=2, seed=0)
        >>> resumed.load_state_dict(loader.state_dict())
        >>> [batch.tolist() for batch in resumed] == rest
        True
    """

    sampler: EpochSampler

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        num_replicas: int = 1,
        rank: int = 0,
        shuffle: bool = True,
        seed: int = 0,
        sampler: Sampler[int] | None = None,
        **kwargs: Any,
    ) -> None:
        if sampler is not None and not isinstance(sampler, SequentialSampler):
            raise ValueError(
                f"sampler is a {type(sampler).__name__}: a ResumableDataLoader knows how far it got in an order of its "
                "own only. Leave sampler out and give shuffle and seed, or use a plain DataLoader"
            )
        super().__init__(
            dataset, sampler=EpochSampler(dataset, num_replicas, rank, shuffle and sampler is None, seed), **kwargs
        )
        self._samples = 0  # of all processes, up to the next batch of the current or last pass
        self._resume: dict[str, int] | None = None  # a loaded state that was not used yet

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator reads nothing before the first batch is asked for. Lightning calls iter() before it sets the
        # epoch, so worker processes would otherwise fetch batches of the wrong epoch.
        sampler = self.sampler
        resume, self._resume = self._resume, None
        self._samples = 0
        if resume is not None and resume["epoch"] == sampler.epoch:  # otherwise Lightning continues with the next epoch
            self._check_order(resume)
            self._samples = resume["samples"]
        sampler.skip = self._samples // sampler.num_replicas
        for batch in super().__iter__():
            # Before the yield: a checkpoint is saved while the consumer has the batch.
            self._samples += (self.batch_size or 1) * sampler.num_replicas
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return where the next batch begins, as plain numbers that are the same on all ranks."""
        if self._resume is not None:
            return self._resume
        return {"epoch": self.sampler.epoch, "samples": self._samples, **self._order()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Begin the next pass where the state was taken, if the pass is through the same epoch.

        The pass raises a ValueError if the data set has another length or the seed differs, because the order differs.
        """
        self._resume = dict(state_dict)

    def _order(self) -> dict[str, int]:
        """Return what the order of an epoch depends on."""
        assert isinstance(self.dataset, Sized)
        return {"dataset_length": len(self.dataset), "seed": self.sampler.seed}

    def _check_order(self, state: dict[str, int]) -> None:
        for name, ours in self._order().items():
            if state[name] != ours:
                raise ValueError(
                    f"the checkpoint was saved in the middle of an epoch over data with {name} {state[name]}, and "
                    f"these have {name} {ours}: resume with the data and seed that it was trained with"
                )
