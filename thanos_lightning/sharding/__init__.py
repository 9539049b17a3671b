"""Who holds which piece of a parameter: how to read, write and mask it, and how ranks agree."""

from thanos_lightning.sharding.access import LocalPiece, ParameterAccess
from thanos_lightning.sharding.choice import check_strategy, choose_access
from thanos_lightning.sharding.frozen import copy_to_frozen, frozen_state, place_frozen
from thanos_lightning.sharding.resume import guard_resume

__all__ = [
    "LocalPiece",
    "ParameterAccess",
    "check_strategy",
    "choose_access",
    "copy_to_frozen",
    "frozen_state",
    "guard_resume",
    "place_frozen",
]
