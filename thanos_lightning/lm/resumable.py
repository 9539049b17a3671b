"""A DataLoader that goes on in the middle of an epoch, under any number of processes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sized
from typing import Any

from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, SequentialSampler


class EpochSampler(DistributedSampler[int]):
    """Indices in an order that depends on the seed and the epoch alone, from a given position on.

    Args:
        dataset: What has a length.
        num_replicas: Processes that share the samples.
        rank: This process.
        shuffle: Whether to permute. If not, all epochs have the order of the data set.
        seed: Of the permutations.

    Attributes:
        skip: Leading indices of this process to leave out.
    """

    def __init__(self, dataset: Dataset[Any], num_replicas: int, rank: int, shuffle: bool, seed: int) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)
        self.skip = 0

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(super().__iter__(), self.skip, None)


class ResumableDataLoader(DataLoader[Any]):
    """A DataLoader whose state is how far it got, for Lightning to keep in its checkpoints.

    The order of the samples is a function of the seed and the epoch; the state counts the samples that all processes
    together have been handed. So a resumed run continues with the sample after, without fetching those before, also
    with another batch size or number of processes (then exactly, where the count is a multiple of the new
    number). What worker processes have fetched ahead does not count.

    Its sampler shares the samples among `num_replicas` processes: Lightning finds a `DistributedSampler` and leaves it
    alone. Lightning sets the epoch; in a loop of your own call `loader.sampler.set_epoch(epoch)`.

    Args:
        dataset: A map-style data set.
        num_replicas: Processes that share the samples.
        rank: This process.
        shuffle: Whether to permute, differently in each epoch.
        seed: Of the permutations, the same on all ranks.
        sampler: For Lightning, which puts a `SequentialSampler` in for `overfit_batches`: like shuffle=False.
        **kwargs: As for `DataLoader`.

    Raises:
        ValueError: For another sampler: its order can't be known.

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
        self._batches = 0  # that have been handed out, of the current or last pass
        self._skipped = 0  # samples of all processes that this pass began after
        self._resume: dict[str, int] | None = None  # a state that has been loaded and not been used yet

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator, so that nothing is read before the first batch is asked for: Lightning calls iter() first, and
        # sets the epoch after. Worker processes would by then have fetched batches of the wrong epoch.
        sampler = self.sampler
        resume, self._resume = self._resume, None
        self._batches = self._skipped = 0
        if resume is not None and resume["epoch"] == sampler.epoch:  # else Lightning goes on with the epoch after
            self._check_order(resume)
            self._skipped = resume["samples"]
        sampler.skip = self._skipped // sampler.num_replicas
        for batch in super().__iter__():
            self._batches += 1  # before the consumer has it: a checkpoint is saved while it does
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Where the next batch begins: plain numbers, the same on all ranks."""
        if self._resume is not None:
            return self._resume
        assert self.batch_size is not None
        handed_out = self._batches * self.batch_size * self.sampler.num_replicas
        return {"epoch": self.sampler.epoch, "samples": self._skipped + handed_out, **self._order()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Begin the next pass where the state was taken, if it is a pass through the same epoch.

        That pass raises a ValueError if its order is another one: another length of the data set, or another seed.
        """
        self._resume = dict(state_dict)

    def _order(self) -> dict[str, int]:
        """What the order of an epoch depends on."""
        assert isinstance(self.dataset, Sized)
        return {"dataset_length": len(self.dataset), "seed": self.sampler.seed}

    def _check_order(self, state: dict[str, int]) -> None:
        for name, ours in self._order().items():
            if state[name] != ours:
                raise ValueError(
                    f"the checkpoint was saved in the middle of an epoch over data with {name} {state[name]}, and "
                    f"these have {name} {ours}: resume with the data and seed that it was trained with"
                )
