"""Full training of some layers or modules: these move, the others stay."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from parsing import problems_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from utils.model.trainable import freeze_others
from utils.runtime.errors import UserError


def moved(before, after):
    return {name for name in before if not torch.equal(before[name].float(), after[name].float())}


@pytest.mark.parametrize(("flags", "kept"), [
    (["--trainable_layers", "1"], "layers.1."), (["--trainable_layers", "-1"], "layers.0."),
    (["--trainable_modules", r"mlp\.down_proj"], "down_proj"),
])  # fmt: skip
def test_only_the_chosen_weights_move(train, tiny_models, flags, kept):
    base = tiny_models()
    folder = train("--train_mode", "full", *flags, "--max_steps", "2", "--learning_rate", "1e-2", model=base)
    before, after = (load_file(f"{path}/model.safetensors") for path in (base, folder))
    assert before.keys() == after.keys()
    assert moved(before, after) == {name for name in before if kept in name}


def test_layers_and_modules_add_up():
    model = AutoModelForCausalLM.from_config(tiny.config_for("llama", 64))
    freeze_others(model, SimpleNamespace(trainable_layers=1, trainable_modules="^model.norm"), log=False)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".1." in name or name == "model.norm.weight"}


def test_a_choice_of_nothing_is_refused():
    model = AutoModelForCausalLM.from_config(tiny.config_for("llama", 64))
    with pytest.raises(UserError, match="no weight of LlamaForCausalLM is chosen"):
        freeze_others(model, SimpleNamespace(trainable_layers=None, trainable_modules="nothing"), log=False)


@pytest.mark.parametrize(("flags", "said"), [
    (["--trainable_layers", "2"], "and --train_mode lora trains an adapter"),
    (["--train_mode", "full", "--trainable_layers", "0"], "--trainable_layers 0 trains no layer"),
    (["--train_mode", "full", "--trainable_modules", "("], "is no regular expression"),
])  # fmt: skip
def test_flags_are_checked_before_the_model_loads(parse, flags, said):
    assert any(said in problem for problem in problems_of(parse, *flags))


def test_the_memory_plan_counts_what_is_trained(parse):
    from utils.memory.layout import optimizer_groups
    from utils.model.meta import meta_model

    args, train_args = parse("--train_mode", "full", "--trainable_layers", "1")
    model = meta_model(args, train_args, False)
    names = {id(weight): name for name, weight in model.named_parameters()}
    trained = {names[id(weight)] for group in optimizer_groups(args, train_args, model) for weight in group}
    last = f"layers.{model.config.num_hidden_layers - 1}."
    assert trained == {name for name in names.values() if last in name}
