import itertools

import pytest
import torch
from torch.utils.data import RandomSampler

from thanos_lightning.lm.resumable import ResumableDataLoader


def _flat(batches):
    return list(itertools.chain.from_iterable(batches))


def _loader(dataset=None, **kwargs):
    return ResumableDataLoader(dataset or range(20), **{"batch_size": 3, "seed": 7, **kwargs})


def _epoch(loader, epoch=0, number=None):
    loader.sampler.set_epoch(epoch)
    return [batch.tolist() for batch in itertools.islice(loader, number)]


def _resumed(state, *args, **kwargs):
    loader = _loader(*args, **kwargs)
    loader.load_state_dict(state)
    return loader


def test_the_order_is_a_function_of_seed_and_epoch():
    loader = _loader()
    first, second = _epoch(loader, 0), _epoch(loader, 1)
    assert sorted(_flat(first)) == sorted(_flat(second)) == list(range(20))
    assert first != second
    assert _epoch(loader, 0) == first == _epoch(_loader(), 0)
    assert _epoch(_loader(seed=8), 0) != first
    torch.manual_seed(5)
    assert _epoch(loader, 1) == second
    assert _flat(_epoch(_loader(shuffle=False))) == list(range(20))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("taken", [0, 1, 4, 6, 7])
def test_goes_on_after_the_batches_that_were_handed_out(num_workers, taken):
    expected = _epoch(_loader(), 2)
    loader = _loader(num_workers=num_workers)
    _epoch(loader, 2, taken)
    resumed = _resumed(loader.state_dict(), num_workers=num_workers)
    assert _epoch(resumed, 2) == expected[taken:]
    assert _epoch(resumed, 3) == _epoch(_loader(), 3)
    assert len(resumed) == len(expected)
    resumed.load_state_dict(loader.state_dict())
    assert _epoch(resumed, 3) == _epoch(_loader(), 3)  # another epoch begins at its beginning


def test_fetches_nothing_of_what_is_skipped():
    class Counting(list):
        def __getitem__(self, index):
            fetched.append(index)
            return index

    loader, fetched = _loader(), []
    seen = _epoch(loader, number=4)
    _epoch(_resumed(loader.state_dict(), Counting(range(20))))
    assert sorted(fetched + _flat(seen)) == list(range(20))


def test_the_epoch_may_be_set_after_iter_with_workers():
    # Lightning calls iter() first; prefetching must not have begun
    loader = _loader(num_workers=1)
    batches = iter(loader)
    loader.sampler.set_epoch(1)
    assert [batch.tolist() for batch in batches] == _epoch(_loader(), 1)


def test_resumes_twice_in_one_epoch():
    expected, state = _epoch(_loader()), None
    for start in (0, 2, 4):
        loader = _loader()
        if state is not None:
            loader.load_state_dict(state)
            assert loader.state_dict() == state
        assert _epoch(loader, number=2) == expected[start : start + 2]
        state = loader.state_dict()


@pytest.mark.parametrize(("replicas", "batch_size"), [(1, 3), (2, 3), (4, 3), (3, 2), (1, 12)])
def test_goes_on_with_other_processes_and_batch_sizes(replicas, batch_size):
    loaders = [_loader(range(24), num_replicas=2, rank=rank) for rank in range(2)]
    seen = [_epoch(loader, number=2) for loader in loaders]
    settings = {"num_replicas": replicas, "batch_size": batch_size}
    rest = [_epoch(_resumed(loaders[0].state_dict(), range(24), rank=rank, **settings)) for rank in range(replicas)]
    assert sorted(_flat(_flat(seen + rest))) == list(range(24))


def test_another_sampler_is_refused():
    with pytest.raises(ValueError, match="sampler is a RandomSampler"):
        _loader(sampler=RandomSampler(range(20)))
