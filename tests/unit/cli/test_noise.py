import logging
import warnings

import pytest

from thanos_lightning.cli import silence


def test_only_what_is_not_ours_to_say_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    log.propagate = True
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.INFO, logger=log.name):
        silence()
        for message in ("💡 Tip: try litlogger", "TPU available: False, using: 0 TPU cores", "GPU available: False"):
            log.info(message)
        warnings.warn("`isinstance(treespec, LeafSpec)` is deprecated, use another", FutureWarning, stacklevel=1)
        warnings.warn("`torch.distributed.all_gather_into_tensor` is deprecated. Use", FutureWarning, stacklevel=1)
        warnings.warn("The 'val_dataloader' does not have many workers which may be a bottleneck", stacklevel=1)
        warnings.warn("Precision bf16-mixed is not supported by the model summary.", stacklevel=1)
        warnings.warn("the schedule's last event is the last step", stacklevel=1)
    assert caplog.messages == ["GPU available: False"]
    assert [str(one.message) for one in caught] == ["the schedule's last event is the last step"]
