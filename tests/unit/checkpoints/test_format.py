from torch import nn
from toy import ToyLM, tiny_gpt2, tiny_llama

from thanos_lightning.checkpoints.format import training_note


def test_a_note_names_the_parameters_of_each_optimizer() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    first, second = [module[1].weight, module[0].bias, None], [module[0].weight]
    note = training_note(module, [first, second], targets=["0"])
    assert note == {"format": 7, "optimizer_parameters": [["1.weight", "0.bias", None], ["0.weight"]]}


def test_a_note_describes_the_model_with_the_targets() -> None:
    module = ToyLM()
    module.model = nn.ModuleDict({"teacher": tiny_gpt2(), "student": tiny_llama()})  # type: ignore[assignment]
    targets = ["model.student.model.layers.0.mlp.up_proj"]
    note = training_note(module, [], targets)
    assert (note["model_prefix"], note["architecture"]) == ("model.student.", "LlamaForCausalLM")
    assert note["config"]["hidden_size"] == 32
    assert note["dtype"] == "float32"
    # the outermost of nested models: LlamaForCausalLM, not the LlamaModel inside
    assert training_note(tiny_llama(), [], ["model.layers.0.mlp.up_proj"])["model_prefix"] == ""
