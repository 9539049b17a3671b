import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from checkpoint_cases import change_checkpoint, failed, state_of, train, untied_llama
from toy import FAMILIES, GROUPED, VOCABULARY, ToyLM

from thanos_lightning import TargetOverride
from thanos_lightning.checkpoints.export import NonconformingError, export_checkpoint
from thanos_lightning.checkpoints.verify import verify_checkpoint
from thanos_lightning.cli import main
from thanos_lightning.solver import Channels, Experts

pytestmark = pytest.mark.filterwarnings("ignore:.*names no tokenizer.*")
CHANNELS: dict[str, Any] = {"pattern": "channels", "sparsity": 0.25, "multiple_of": 4}
SIDE = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
BART = {f"{side}_{what}": number for side in ("encoder", "decoder") for what, number in SIDE.items()}  # a width each
# name -> class of the configuration, and its settings
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    **FAMILIES,
    "as wide as the residual stream": (t.LlamaConfig, {**GROUPED, "intermediate_size": 32}),
    "another size that heads have to divide": (t.LlamaConfig, {**GROUPED, "intermediate_size": 32, "head_dim": 8}),
    "bart": (t.BartConfig, {"vocab_size": VOCABULARY, "d_model": 32, **BART}),
}
WIDTHS = {"gpt2": "n_inner", "opt": "ffn_dim", "bart": "decoder_ffn_dim"}  # the configuration's name of the width
KINDS = {"bert": t.AutoModelForMaskedLM, "bart": t.AutoModelForSeq2SeqLM}
TOKENS = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose channels are pruned, not to be written to."""
    return train(tmp_path_factory.mktemp("channels"), ToyLM(untied_llama()), **CHANNELS)


@pytest.mark.parametrize("name", MODELS)
def test_the_smaller_model_computes_what_the_masked_one_does(tmp_path: Path, name: str) -> None:
    config, settings = MODELS[name]
    kind, entry = KINDS.get(name, t.AutoModelForCausalLM), WIDTHS.get(name, "intermediate_size")
    before = settings.get(entry, 128)  # four times the residual stream, for GPT-2
    after = before * 3 // 4
    torch.manual_seed(0)
    ignored = {"ignore": ["*decoder"]} if name == "bert" else {}
    checkpoint = train(tmp_path, ToyLM(kind.from_config(config(**settings))), **CHANNELS, **ignored)
    reports = export_checkpoint(checkpoint, tmp_path / "small")
    export_checkpoint(checkpoint, tmp_path / "masked", keep_shape=True)
    small, masked = (kind.from_pretrained(tmp_path / one).eval() for one in ("small", "masked"))
    assert getattr(small.config, entry) == after
    assert getattr(masked.config, entry) in (before, None)
    for model in (checkpoint, tmp_path / "small", tmp_path / "masked"):
        assert not failed(verify_checkpoint(model))
    sizes = [size for report in reports for size in zip(report.dense_shape or (), report.shape, strict=True)]
    assert {size for size in sizes if size[0] != size[1]} <= {(before, after), (2 * before, 2 * after)}
    with torch.no_grad():
        one, other = small(TOKENS).logits, masked(TOKENS).logits
    assert (one - other).norm() <= 1e-5 * other.norm()
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in masked.parameters())


def test_it_is_a_normal_model(trained: Path, tmp_path: Path) -> None:
    export_checkpoint(trained, tmp_path / "small", dtype="bfloat16")
    model = t.AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.generate(TOKENS, max_new_tokens=3, do_sample=False).shape == (2, 15)
    module = ToyLM(t.AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32))
    again = train(tmp_path, module, **{**CHANNELS, "sparsity": 0.5, "multiple_of": 6})
    export_checkpoint(again, tmp_path / "smaller")
    assert t.AutoConfig.from_pretrained(tmp_path / "smaller").intermediate_size == 18


def test_what_the_commands_the_record_and_the_card_say(trained: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert main(["export", str(trained), str(out)]) == 0
    said = capsys.readouterr().out
    assert "6 tensors conform (channels), 0.00% of their entries are 0; 48 channels became 36" in said
    assert "quantise" not in said
    assert main(["verify", str(out)]) == 0
    assert "48 channels became 36" in capsys.readouterr().out
    assert main(["export", str(trained), str(tmp_path / "masked"), "--keep-shape"]) == 0
    said = capsys.readouterr().out
    assert "25.00% of their entries are 0" in said
    assert "became" not in said
    record = json.loads((out / "sparsity.json").read_text())
    entry = record["tensors"]["model.layers.0.mlp.down_proj.weight"]
    assert (entry["pattern"], entry["sparsity"], entry["dim"]) == ("channels", 0.25, 1)
    assert (entry["shape"], entry["dense_shape"], entry["zeros"]) == ([32, 36], [32, 48], 0)
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "48 channels became 36" in card
    assert "    pattern = Channels(sparsity=0.25)" in card


def test_other_layers_keep_their_zeros(tmp_path: Path) -> None:
    module = ToyLM(untied_llama())
    checkpoint = train(tmp_path, module, **CHANNELS, overrides=[TargetOverride(["*.self_attn.*"], "2:4")])
    reports = {report.name: report for report in export_checkpoint(checkpoint, tmp_path / "out")}
    assert not failed(verify_checkpoint(tmp_path / "out"))
    assert reports["model.layers.0.self_attn.q_proj.weight"].zeros == 512
    assert reports["model.layers.0.self_attn.q_proj.weight"].dense_shape is None
    assert reports["model.layers.0.mlp.down_proj.weight"].shape == (32, 36)


@pytest.mark.parametrize("part", ["weights", "channel"])
def test_zeros_that_are_no_whole_channels_are_named(trained: Path, tmp_path: Path, part: str) -> None:
    name = "model.model.layers.1.mlp.up_proj.weight"

    def fill(content: dict[str, Any]) -> None:
        row = content["state_dict"][name].eq(0).all(1).nonzero()[0]
        content["state_dict"][name][row, 3 if part == "weights" else slice(None)] = 0.5

    broken = change_checkpoint(trained, tmp_path / "broken.ckpt", fill)
    with pytest.raises(NonconformingError, match=r"1 of 6 .*\(model.layers.1.mlp.up_proj.weight: .* are not 0"):
        export_checkpoint(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_width_of_which_the_configuration_knows_nothing(trained: Path, tmp_path: Path) -> None:
    def leave_one_block_out(content: dict[str, Any]) -> None:
        state = state_of(content)
        for name in [name for name in state["masks"] if ".layers.1." in name]:
            del state["masks"][name], state["pruned"][name]

    partly = change_checkpoint(trained, tmp_path / "partly.ckpt", leave_one_block_out)
    with pytest.raises(ValueError, match=r"no entry that makes feed-forward blocks 36 channels wide .* --keep-shape"):
        export_checkpoint(partly, tmp_path / "out")


def test_before_any_channel_is_gone_the_model_stays(trained: Path, tmp_path: Path) -> None:
    """The first of many events may ask for less than one channel."""

    def fill(content: dict[str, Any]) -> None:
        for mask in state_of(content)["masks"].values():
            mask["bits"].fill_(255)
            mask["sparsity"] = 0.001
        state_of(content)["pruned"] = dict.fromkeys(state_of(content)["pruned"], 0)

    early = change_checkpoint(trained, tmp_path / "early.ckpt", fill)
    export_checkpoint(early, tmp_path / "out")
    assert t.AutoConfig.from_pretrained(tmp_path / "out").intermediate_size == 48


@pytest.mark.parametrize("pattern", [Channels(0.25), Experts(0.5)])
def test_channels_and_experts_are_not_verified_by_a_pattern(trained: Path, pattern: Channels | Experts) -> None:
    with pytest.raises(ValueError, match=r" are checked by what was recorded.*leave --pattern out"):
        verify_checkpoint(trained, pattern)
