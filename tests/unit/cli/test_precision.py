import pytest
import torch

from thanos_lightning.cli.precision import fast_precision


@pytest.fixture
def cpu(monkeypatch):
    def has(*instructions):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: "AMX" in instructions)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: "AVX512-BF16" in instructions)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    return has


@pytest.fixture
def gpus(monkeypatch):
    def have(*capabilities):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "the name")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])

    monkeypatch.setattr(torch.version, "hip", None)
    return have


@pytest.mark.parametrize("accelerator", ["cpu", "auto"])
@pytest.mark.parametrize(
    ("instructions", "precision", "why"),
    [
        ((), "32-true", "this CPU has no instructions for bf16 (AMX or AVX512-BF16)"),
        (("AVX512-BF16",), "bf16-mixed", "this CPU multiplies bf16 (AVX512-BF16)"),
        (("AMX", "AVX512-BF16"), "bf16-mixed", "this CPU multiplies bf16 (AMX)"),
    ],
)
def test_cpu(cpu, accelerator, instructions, precision, why):
    cpu(*instructions)
    assert fast_precision(accelerator) == (precision, why)


@pytest.mark.parametrize("accelerator", ["gpu", "cuda", "auto"])
@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [
        ([(9, 0)], "bf16-mixed"),
        ([(8, 0), (8, 9)], "bf16-mixed"),
        ([(7, 5)], "16-mixed"),
        ([(9, 0), (7, 0)], "16-mixed"),
    ],
)
def test_gpus(gpus, accelerator, capabilities, precision):
    gpus(*capabilities)
    found, why = fast_precision(accelerator)
    assert found == precision
    assert "(the name)" in why


def test_gpus_of_another_maker(gpus, monkeypatch):
    gpus((9, 4))
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert fast_precision("gpu")[0] == "bf16-mixed"


def test_a_cpu_beside_a_gpu(gpus, cpu):
    cpu()
    gpus((9, 0))
    assert fast_precision("cpu")[0] == "32-true"


def test_other_devices(cpu, monkeypatch):
    cpu("AMX")
    assert fast_precision("tpu")[0] == "32-true"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert fast_precision("auto")[0] == "32-true"
