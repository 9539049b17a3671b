"""CausalLM: a LightningModule around a Hugging Face causal language model."""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeGuard, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.text import Perplexity
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from typing_extensions import override

from thanos_lightning.checkpoints.format import CALLBACK_KEY
from thanos_lightning.checkpoints.huggingface import first_line, uncast_buffers
from thanos_lightning.collect.outputs import sampled_loss
from thanos_lightning.collect.tokens import IGNORED_LABEL, counted_predictions
from thanos_lightning.layers.lora import initialise_partitioned, mask_adapters
from thanos_lightning.lm.distillation import START, Distillation, check_teacher, distil, num_chunks, other_vocabulary
from thanos_lightning.lm.pretrained import load_pretrained, torch_dtype
from thanos_lightning.lm.text import TextData
from thanos_lightning.ranks.choice import place_frozen, require_own_gathering, sharding_config
from thanos_lightning.ranks.view import whole_shape

Decay = Literal["linear", "cosine", "constant"]

_FUSED = ("cpu", "cuda", "mps", "xpu")  # devices on which torch steps AdamW in one kernel
_TOKENS_PER_CHUNK = 2048  # whose logits are fp32 at one time: 1 GiB for a vocabulary of 128,000


def lr_factor(step: int, warmup_steps: int, total_steps: float, schedule: Decay) -> float:
    """Return the factor of the learning rate at an optimizer step.

    It rises linearly from 1 / (warmup_steps + 1) to 1 at `warmup_steps`, then stays ("constant") or falls towards 0 at
    `total_steps`, the end of the training. `step` counts the steps before this one.

    Examples:
        >>> [lr_factor(step, 1, 5, "linear") for step in range(5)]
        [0.5, 1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    x = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 1.0 - x if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * x))


def _is_zero3(strategy: Strategy | None) -> TypeGuard[DeepSpeedStrategy]:
    return isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3


@contextmanager
def _zero3_loading(module: LightningModule, config: dict[str, Any] | None = None) -> Iterator[None]:
    """Tell transformers about ZeRO-3, so that pretrained weights reach the pieces that the ranks hold.

    `config` is DeepSpeed's configuration, if it is not that of the training.
    """
    strategy = None
    with suppress(RuntimeError):  # there is no Trainer
        strategy = module.trainer.strategy
    if not _is_zero3(strategy):
        yield
        return
    if importlib.util.find_spec("accelerate") is None:
        raise ImportError("loading a pretrained model under ZeRO-3 needs accelerate: pip install accelerate")
    from transformers.integrations import HfDeepSpeedConfig

    known = HfDeepSpeedConfig(config or strategy.config)  # transformers keeps a weak reference
    try:
        yield
    finally:
        del known


def add_lora(model: PreTrainedModel, arguments: Mapping[str, Any]) -> None:
    """Put a masked adapter on a loaded model, in place, and freeze all but the adapter.

    `arguments` are those of peft's LoraConfig. Raises ValueError if peft refuses them, or the model has no such layers.
    """
    if importlib.util.find_spec("peft") is None:
        raise ImportError("lora needs peft: pip install 'thanos-lightning[lora]'")
    from peft import LoraConfig, inject_adapter_in_model

    try:
        inject_adapter_in_model(LoraConfig(**arguments), model)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"lora is {dict(arguments)}, which peft refuses ({first_line(error)}): give arguments of its "
            "LoraConfig, such as {r: 16, lora_alpha: 32, target_modules: all-linear}"
        ) from error
    mask_adapters(model)
    initialise_partitioned(model, arguments.get("init_lora_weights", True))


@dataclass(frozen=True)
class _Teacher:
    """Keeps a model from being a submodule, so that it is not saved, trained or pruned."""

    model: PreTrainedModel
    is_placed: bool

    def __deepcopy__(self, memo: dict[int, Any]) -> _Teacher:
        return self  # a copy that averages weights needs no second teacher


class CausalLM(LightningModule):
    """Trains a causal language model on batches of `input_ids`, `attention_mask` and `labels`.

    It logs `train/loss`, `val/loss`, `val/perplexity`, `test/loss` and `test/perplexity`. The optimizer is AdamW; norms
    and biases don't decay.

    Args:
        model: A hub name, a local folder or "smollm2-135m"; in Python also a loaded model.
        learning_rate: The highest learning rate.
        weight_decay: Weight decay of parameters with more than one dimension.
        warmup: Optimizer steps in which the learning rate rises: an int, or a fraction of the training in (0, 1).
        lr_schedule: Learning rate after the warmup: "linear" or "cosine" towards 0, or "constant".
        dtype: "float32", "bfloat16" or "float16", for the parameters. None follows the Trainer's precision: float32
            under "32-true" and the mixed precisions, in which AdamW updates float32 weights.
        gradient_checkpointing: Recompute activations in the backward pass instead of keeping them.
        attn_implementation: The argument of transformers. None leaves the choice to transformers.
        lora: Arguments of peft's LoraConfig, such as {r: 16, lora_alpha: 32, target_modules: all-linear}: only the
            adapters are trained. With a `ThanosPruningCallback`, what they learn stays where weights are not pruned,
            and an export merges it. Needs peft.
        distillation: A `Distillation` makes the model learn from a dense teacher, too. None learns from the text alone.
            In bfloat16 the teacher takes 2 bytes per parameter on each rank, or over all ranks together under ZeRO-3.
            Checkpoints do not contain the teacher: a resumed training makes it again.

    Attributes:
        model: The Hugging Face model, None until `configure_model` has loaded it.
        tokenizer_name: The model's name for `load_tokenizer`. None until it is loaded, or if it has no name.

    Raises:
        ValueError: If an argument is invalid.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from thanos_lightning.lm import CausalLM, TextData
        >>> lm = CausalLM("smollm2-135m", learning_rate=5e-5, warmup=0.1)
        >>> data = TextData("python-reference", "smollm2-135m")
        >>> Trainer(max_steps=50, precision="bf16-mixed").fit(lm, data)  # doctest: +SKIP
    """

    # More than eight parameters: each is a key of the recipes
    def __init__(
        self,
        model: str | PreTrainedModel,
        learning_rate: float = 5e-5,
        weight_decay: float = 0.0,
        warmup: int | float = 0,
        lr_schedule: Decay = "linear",
        dtype: str | None = None,
        gradient_checkpointing: bool = False,
        attn_implementation: str | None = None,
        lora: dict[str, Any] | None = None,
        distillation: Distillation | dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not (math.isfinite(learning_rate) and learning_rate > 0):
            raise ValueError(f"learning_rate is {learning_rate}: give a number > 0, such as 5e-5")
        if not (math.isfinite(weight_decay) and weight_decay >= 0):
            raise ValueError(f"weight_decay is {weight_decay}: give a number ≥ 0")
        if warmup < 0 or (isinstance(warmup, float) and not (0 < warmup < 1 or warmup.is_integer())):
            raise ValueError(f"warmup is {warmup}: give optimizer steps, or a fraction of the training between 0 and 1")
        if lr_schedule not in get_args(Decay):
            raise ValueError(f"lr_schedule is {lr_schedule!r}: choose one of {', '.join(get_args(Decay))}")
        self.model: PreTrainedModel | None = None
        self.tokenizer_name: str | None = None
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup = warmup
        self.lr_schedule = lr_schedule
        self.dtype_name = dtype
        self.gradient_checkpointing = gradient_checkpointing
        self.attn_implementation = attn_implementation
        self.lora = lora
        if isinstance(distillation, Mapping):  # from a checkpoint
            distillation = Distillation(**distillation)
        self.distillation = distillation
        self._teacher: _Teacher | None = None
        self._is_pruned = False
        self.val_perplexity = Perplexity(ignore_index=IGNORED_LABEL)
        self.test_perplexity = Perplexity(ignore_index=IGNORED_LABEL)
        if isinstance(model, str):
            self.model_name = model
            self.save_hyperparameters(ignore=["distillation"])
        else:
            for name, value in (("dtype", dtype), ("attn_implementation", attn_implementation)):
                if value is not None:
                    raise ValueError(
                        f"{name} is {value!r}, but the model is loaded already: load it so, or give its name as model"
                    )
            self.save_hyperparameters(ignore=["model", "distillation"])
            self._adopt(model)
        # Plain values, so that any reader of a checkpoint understands them.
        self.save_hyperparameters({"distillation": None if distillation is None else asdict(distillation)})

    @override
    def configure_model(self) -> None:
        """Load the model in this hook, because the Trainer calls it in the context of its precision and device."""
        if self.model is None:
            with _zero3_loading(self):
                model = load_pretrained(self.model_name, self.dtype_name, self.attn_implementation)
            self._adopt(model)

    @override
    def setup(self, stage: str) -> None:
        wanted = self.distillation is not None and self.distillation.teacher == START
        # Copy now: a model that was given loaded cannot be loaded again, and a checkpoint may soon be loaded into it.
        if stage == "fit" and wanted and self.model is not None and self._teacher is None:
            self._teacher = _Teacher(copy.deepcopy(self.model), is_placed=False)

    @override
    def on_fit_start(self) -> None:
        """Load the teacher, and check that the text and the teacher fit the model."""
        self._check_tokens()
        if self.distillation is None or (self._teacher is not None and self._teacher.is_placed):
            return
        assert self.model is not None
        name = self.distillation.teacher
        teacher = self._load_teacher(self.distillation) if self._teacher is None else self._teacher.model
        teacher = teacher.to(torch_dtype(self.distillation.dtype)).eval().requires_grad_(False)
        self._teacher = _Teacher(place_frozen(teacher, self.trainer.strategy, teacher.base_model), is_placed=True)
        uncast_buffers(self._teacher.model)
        require_own_gathering(self.model)
        check_teacher(self.model, self._teacher.model)
        if self.tokenizer_name is not None and name != START:
            refused = None
            if self.trainer.is_global_zero:  # for all ranks, because the files may exist only there
                refused = other_vocabulary(self.tokenizer_name, name, self.model.config.get_text_config().vocab_size)
            if (refused := self.trainer.strategy.broadcast(refused)) is not None:
                raise ValueError(refused)

    @override
    def on_train_start(self) -> None:
        """Keep this module's rates and warn if zeros will be lost. By now every strategy has loaded its checkpoint."""
        self._keep_rates()
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        if self._is_pruned and not any(callback.state_key == CALLBACK_KEY for callback in callbacks):
            self._is_pruned = False
            rank_zero_warn(
                "this model is pruned, but the Trainer has no ThanosPruningCallback: its zeros will be lost with the "
                "first optimizer step. To keep them, give the Trainer the callback that the model was pruned with (and "
                "ckpt_path), or a new one, which keeps the zeros that it finds"
            )

    def _check_tokens(self) -> None:
        """Refuse text with tokens that have no embedding in the model. torch would only raise an IndexError."""
        assert self.model is not None
        data = getattr(self.trainer, "datamodule", None)
        known: int = self.model.config.get_text_config().vocab_size
        if isinstance(data, TextData) and data.vocabulary() > known and data.largest_token() >= known:
            raise ValueError(
                f"the tokenizer {data.tokenizer!r} has {data.vocabulary()} tokens and the model {known}, and the text "
                f"holds token {data.largest_token()}: give the model's own tokenizer"
            )

    def _load_teacher(self, wanted: Distillation) -> PreTrainedModel:
        name = self.model_name if wanted.teacher == START else wanted.teacher
        with _zero3_loading(self, sharding_config(self.trainer.strategy, torch_dtype(wanted.dtype))):
            try:
                return load_pretrained(name, wanted.dtype, self.attn_implementation)
            except (OSError, ValueError) as error:
                why = error.__cause__ or error  # load_pretrained's message repeats the name and the advice
                raise MisconfigurationException(
                    f"the teacher {name!r} can't be loaded ({why}): give {START!r}, or the hub name or the folder of a "
                    "model"
                ) from error

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note whether the model is pruned."""
        pruning = checkpoint.get("callbacks", {}).get(CALLBACK_KEY)
        self._is_pruned = pruning is not None and bool(pruning["report"]["events"])

    def _adopt(self, model: PreTrainedModel) -> None:
        if self.lora is not None:
            add_lora(model, self.lora)
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model = model.train()  # from_pretrained leaves it in evaluation mode
        self.tokenizer_name = model.name_or_path or None

    @override
    def forward(self, **batch: Any) -> CausalLMOutput:
        """Run the model.

        Args:
            **batch: What the model's forward takes: `input_ids`, `attention_mask` and, for a loss, `labels`, each int64
                of shape (batch, tokens).

        Returns:
            The model's output, with logits of shape (batch, tokens, vocabulary).

        Raises:
            RuntimeError: If the model is not loaded.
        """
        if self.model is None:
            raise RuntimeError(f"model {self.model_name!r} is not loaded: call configure_model() first")
        # Whole blocks go in at once, so a cache of keys and values would only cost memory.
        return self.model(**{"use_cache": False, **batch})

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        size = len(batch["input_ids"])
        if self.distillation is not None:
            assert self.model is not None
            assert self._teacher is not None
            entropy, divergence = distil(self.model, self._teacher.model, batch, self._agreed_chunks(batch))
            self.log_dict({"train/cross_entropy": entropy, "train/logits": divergence}, batch_size=size)
            loss = self.distillation.cross_entropy * entropy + self.distillation.logits * divergence
        else:
            # Not self(...): under ZeRO-3 that would break the order of calls by which DeepSpeed prefetches.
            loss = self.forward(**batch).loss
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        return loss

    def calibration_step(self, batch: dict[str, Tensor]) -> CausalLMOutput | Tensor:
        """Run the model on a batch of the callback's `calibration.batches`.

        Args:
            batch: What `forward` takes. Labels only say which tokens count. Without labels, all but padding count.

        Returns:
            With gradients, the loss of labels that the model draws itself (`sampled_loss`). The gradients of this loss
            weight the outputs. The same tokens get the same labels on every rank, also after the training was resumed.
            Without gradients, the model's output.
        """
        output = self(**{name: value for name, value in batch.items() if name != "labels"})
        if not torch.is_grad_enabled():
            return output
        counted = counted_predictions(batch, output.logits)
        return sampled_loss(output.logits, counted, seed=int(batch["input_ids"].sum()))

    def _agreed_chunks(self, batch: dict[str, Tensor]) -> int:
        """Return the largest number of chunks that any rank needs where each call of a head gathers it on all ranks."""
        chunks = num_chunks(batch["input_ids"].numel())
        strategy = self.trainer.strategy
        if not (isinstance(strategy, ModelParallelStrategy) or _is_zero3(strategy)):
            return chunks  # and wait for no rank
        return int(strategy.reduce(torch.tensor(chunks, device=self.device), reduce_op="max"))

    # Trainer.validate makes metric states in inference mode. The validation of a fit runs outside of that mode and
    # cannot add to them, so each loop begins with a new state.

    @override
    def on_validation_epoch_start(self) -> None:
        self.val_perplexity.reset()

    @override
    def on_test_epoch_start(self) -> None:
        self.test_perplexity.reset()

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate("val", self.val_perplexity, batch)

    @override
    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate("test", self.test_perplexity, batch)

    def _evaluate(self, stage: str, perplexity: Perplexity, batch: dict[str, Tensor]) -> None:
        output = self(**batch)
        # A token's logits predict the next token.
        logits = output.logits[:, :-1].flatten(end_dim=1)  # (batch · (tokens - 1), vocabulary)
        targets = batch["labels"][:, 1:].flatten()
        for some_logits, some_targets in zip(
            torch.split(logits, _TOKENS_PER_CHUNK), torch.split(targets, _TOKENS_PER_CHUNK), strict=True
        ):
            # In fp32, because the metric's softmax would lose precision in bf16.
            perplexity.update(some_logits.float().unsqueeze(0), some_targets.unsqueeze(0))
        self.log(f"{stage}/loss", output.loss, batch_size=len(batch["input_ids"]), on_epoch=True, sync_dist=True)
        self.log(f"{stage}/perplexity", perplexity, prog_bar=True, on_epoch=True)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        total_steps = self.trainer.estimated_stepping_batches
        if total_steps == 0:
            raise ValueError(
                "the training has no optimizer step: raise the Trainer's max_steps, or give a training dataloader that "
                "isn't empty"
            )
        known = math.isfinite(total_steps) and total_steps > 0
        is_fraction = 0 < self.warmup < 1
        if not known and (is_fraction or self.lr_schedule != "constant"):
            raise ValueError(
                f"lr_schedule {self.lr_schedule!r} with warmup {self.warmup} needs the number of optimizer steps, "
                "which is not known: set the Trainer's max_steps, or lr_schedule 'constant' and warmup in steps"
            )
        warmup_steps = round(self.warmup * total_steps) if is_fraction else int(self.warmup)
        # A fused step makes one pass over memory. On CPUs torch's default takes seven times as long.
        fused = True if self.device.type in _FUSED else None
        optimizer = torch.optim.AdamW(self._parameter_groups(), lr=self.learning_rate, fused=fused)
        # Otherwise Lightning could not clip gradients, because a fused optimizer would unscale them itself.
        optimizer._step_supports_amp_scaling = False
        scheduler = LambdaLR(optimizer, lambda step: lr_factor(step, warmup_steps, total_steps, self.lr_schedule))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _keep_rates(self) -> None:
        """Restore this module's learning rate and weight decay if a checkpoint has brought back other values."""
        if getattr(self.configure_optimizers, "__func__", None) is not CausalLM.configure_optimizers:
            return
        for optimizer, config in zip(self.trainer.optimizers, self.trainer.lr_scheduler_configs, strict=False):
            scheduler, groups = config.scheduler, optimizer.param_groups
            rates = [
                {"initial_lr": self.learning_rate, "weight_decay": group["weight_decay"]}
                for group in self._parameter_groups()
            ]
            loaded = [{name: group.get(name) for name in rates[0]} for group in groups]
            if not isinstance(scheduler, LambdaLR) or loaded == rates:
                continue
            scheduler.base_lrs = [self.learning_rate] * len(scheduler.base_lrs)
            for group, of_group, factor in zip(groups, rates, scheduler.lr_lambdas, strict=True):
                group |= {"lr": self.learning_rate * factor(scheduler.last_epoch), **of_group}

    def _parameter_groups(self) -> list[dict[str, Any]]:
        trained: list[nn.Parameter] = [parameter for parameter in self.parameters() if parameter.requires_grad]
        decayed = [parameter for parameter in trained if len(whole_shape(parameter)) > 1]
        others = [parameter for parameter in trained if len(whole_shape(parameter)) <= 1]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]  # DeepSpeed removes empty groups, the scheduler does not
