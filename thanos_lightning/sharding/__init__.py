"""Who holds which piece of a parameter: how to read, write and mask it, and how ranks agree."""

from thanos_lightning.sharding.access import ParameterAccess, choose_access

__all__ = ["ParameterAccess", "choose_access"]
