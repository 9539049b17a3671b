"""An accelerator without a GPU: tensors that say they lie on it, with their numbers in the memory of the CPU.

As on CUDA, operands on two devices are an error (CPU tensors without dimensions excepted), kernels that are not
deterministic are refused where these are asked for. What makes the host wait for the device can be counted, and so can
the kernels that it launches, by the line of the package that asked. What CUDA's kernels round otherwise, only a GPU
tells.
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.library import Library, fallthrough_kernel
from torch.utils import backend_registration
from toy import trainer

import thanos_lightning

_NAME = "pretend"
_PACKAGE = str(Path(thanos_lightning.__file__).parent)
_aten = torch.ops.aten


class _Backend(backend_registration._DummyBackendModule):
    """What torch asks of a device's module, `torch.cuda` for CUDA."""

    def synchronize(self, device: Any = None) -> None:
        _wait("synchronize")

    def empty_cache(self) -> None:
        pass

    def set_device(self, device: Any) -> None:
        pass

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)  # numbers are drawn on the CPU

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


backend_registration._setup_privateuseone_for_python_backend(_NAME, backend_module=_Backend())
DEVICE = torch.device(_NAME, 0)

# What is counted

Counts = collections.Counter[str]
_waits: list[Counts] = []
_launches: list[Counts] = []
_copies: list[Counts] = []


@contextmanager
def _counting(counters: list[Counts]) -> Iterator[Counts]:
    counters.append(collections.Counter())
    try:
        yield counters[-1]
    finally:
        counters.pop()


# Count, inside the block: line of the package, or "elsewhere" -> number
waits = partial(_counting, _waits)  # for the device, by the host
launches = partial(_counting, _launches)  # of kernels; views need none
copies = partial(_counting, _copies)  # from the device to the CPU, or to the device


def _wait(what: str) -> None:
    _add(_waits, what)


def _add(counters: list[Counts], what: str) -> None:
    if not counters:
        return
    frame: Any = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    if frame is None:
        counters[-1]["elsewhere"] += 1
        return
    counters[-1][f"{Path(frame.f_code.co_filename).relative_to(_PACKAGE)}:{frame.f_lineno} {what}"] += 1


# What looks at numbers on the host, and is not marked by torch as such: errors of LAPACK's
_LOOKS = {_aten._linalg_check_errors.default}
_INDEXES = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._unsafe_index.Tensor}
# of floats, on CUDA
_NOT_DETERMINISTIC = {_aten.cumsum.default, _aten.kthvalue.default, _aten.histc.default, _aten.median.dim}
_COPIES = {_aten._to_copy.default, _aten.copy_.default, _aten.copy.default}


def _count(func: Any, args: Any, kwargs: Any, result_device: torch.device | None) -> None:
    name = func.overloadpacket.__name__
    if not func.is_view:
        _add(_launches, name)
    if func in _COPIES:
        source, target = (args[1].device, args[0].device) if len(args) > 1 else (args[0].device, result_device)
        asynchronous = kwargs.get("non_blocking", False) or (len(args) > 2 and args[2])
        if target is not None and source.type != target.type:
            _add(_copies, f"copy to {target.type}")
            if not asynchronous:
                _wait(f"copy to {target.type}")
    elif func in _INDEXES:
        if any(isinstance(one, Tensor) and one.dtype == torch.bool for one in args[1]):
            _wait("index by a mask")
    elif func in _LOOKS or torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
        _wait(name)


# Tensors


class PretendTensor(Tensor):
    """A tensor on the accelerator.

    Attributes:
        numbers: The tensor on the CPU that it stands for.
    """

    numbers: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers: Tensor) -> PretendTensor:
        made: PretendTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=DEVICE,
        )
        made.numbers = numbers
        return made

    def __repr__(self) -> str:
        return f"PretendTensor({self.numbers})"

    def tolist(self) -> Any:
        _wait("tolist")
        return self.numbers.tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.numbers.__reduce_ex__(protocol)  # so it comes back on the CPU, as Lightning loads checkpoints

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert a tensor on {DEVICE} to numpy: call cpu() first")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _numbers(value: Any) -> Any:
    if isinstance(value, PretendTensor):
        return value.numbers
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == _NAME else value


def _leaves(value: Any) -> Iterator[Any]:
    if type(value) in (tuple, list):
        for one in value:
            yield from _leaves(one)
    else:
        yield value


def _mapped(run: Any, value: Any) -> Any:
    """As torch's tree_map, of what operations take and return, such as torch.return_types: in a fifth of the time."""
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(run, one) for one in value)
    return run(value)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation on the numbers, as if on the accelerator."""
    tensors = [leaf for leaf in _leaves((args, tuple(kwargs.values()))) if isinstance(leaf, Tensor)]
    here = [tensor for tensor in tensors if isinstance(tensor, PretendTensor)]
    device = kwargs.get("device")
    device = (DEVICE if here else None) if device is None else torch.device(device)
    _count(func, args, kwargs, device)
    # indices may lie on the CPU
    operands = [args[0], *args[2:]] if func in _INDEXES else tensors
    if here and func not in _COPIES:
        for tensor in operands:
            if isinstance(tensor, Tensor) and not isinstance(tensor, PretendTensor) and tensor.dim() > 0:
                raise RuntimeError(f"{func}: expected all tensors on {DEVICE}, but one is on {tensor.device}")
    is_float = bool(here) and here[0].is_floating_point()
    if torch.are_deterministic_algorithms_enabled() and func in _NOT_DETERMINISTIC and is_float:
        raise RuntimeError(f"{func} does not have a deterministic implementation")
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    result = func(*_mapped(_numbers, args), **{key: _mapped(_numbers, value) for key, value in kwargs.items()})
    if func is _aten.copy_.default:
        return args[0]
    if device is None or device.type != _NAME:
        return result
    same = {id(tensor.numbers): tensor for tensor in here}  # of what is written in place

    def wrapped(one: Any) -> Any:
        if not isinstance(one, Tensor):
            return one
        return same[id(one)] if id(one) in same else PretendTensor(one)

    return _mapped(wrapped, result)


_kernels, _fallbacks = Library("aten", "IMPL"), Library("_", "IMPL")


def _register() -> None:
    for func in _factories():
        _kernels.impl(func, lambda *args, func=func, **kwargs: _run(func, args, kwargs), "PrivateUse1")
    _kernels.impl("_copy_from", _copy_from, "PrivateUse1")
    _fallbacks.fallback(fallthrough_kernel, "AutocastPrivateUse1")
    for name in ("linear", "mm", "bmm", "addmm", "matmul", "baddbmm", "scaled_dot_product_attention"):
        _kernels.impl(name, _in_low_precision(getattr(_aten, name).default), "AutocastPrivateUse1")


def _factories() -> Iterator[Any]:
    """What makes a tensor out of none. (Torch's own way, by `out`, would resize the numbers and not the tensor.)"""
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = name.partition("::")
        packet, _, overload = rest.partition(".")
        if namespace != "aten" or torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd"):
            continue
        func = getattr(getattr(_aten, packet), overload or "default")
        arguments = func._schema.arguments
        takes_none = not any("Tensor" in str(argument.type) for argument in arguments)
        if takes_none and any(argument.name == "device" for argument in arguments):
            yield func


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """What `torch.tensor` calls to fill a tensor of the accelerator."""
    _count(_aten.copy_.default, (target, source, non_blocking), {}, None)
    _numbers(target).copy_(_numbers(source))
    return target


def _in_low_precision(func: Any) -> Any:
    """What autocast does to products on CUDA."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def lower(value: Any) -> Any:
        low = torch.get_autocast_dtype(_NAME)
        is_float = isinstance(value, PretendTensor) and value.dtype == torch.float32
        return value.to(low) if is_float else value

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return func(*_mapped(lower, args), **{key: lower(value) for key, value in kwargs.items()})

    return run


_register()


# Trainers


class PretendAccelerator(Accelerator):
    """What Lightning asks of an accelerator."""

    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [DEVICE]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return _NAME


class Pretending(SingleDeviceStrategy):
    """What Lightning asks of a strategy."""

    def __init__(self) -> None:
        super().__init__(DEVICE, accelerator=PretendAccelerator())

    def model_to_device(self) -> None:
        with _in_place():
            super().model_to_device()

    def teardown(self) -> None:
        with _in_place():
            super().teardown()


@contextmanager
def _in_place() -> Iterator[None]:
    """Move modules as torch does to and from its own devices: parameters stay the objects they are, tied ones tied."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def pretend_trainer(root: Path, *callbacks: Any, **settings: Any) -> Trainer:
    """A Trainer on the accelerator."""
    return trainer(root, *callbacks, accelerator="auto", strategy=Pretending(), **settings)
