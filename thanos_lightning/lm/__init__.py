"""Ready-made parts for fine-tuning a causal language model: the module and the text."""

from thanos_lightning.lm.causal_lm import CausalLM
from thanos_lightning.lm.distillation import Distillation
from thanos_lightning.lm.text import TextData

__all__ = ["CausalLM", "Distillation", "TextData"]
