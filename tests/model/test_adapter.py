"""The adapter: which layers it is added to, which flags reach it, and which weights are trained."""

import json
from typing import get_args, get_type_hints

import pytest
import torch
from modes import MODES
from safetensors.torch import load_file

from utils.args import CommonArgs
from utils.model.adapter import ADAPTERS


def test_every_row_of_adapters_is_a_choice_and_is_tested():
    choices = get_args(get_type_hints(CommonArgs)["train_mode"])
    assert set(ADAPTERS) == set(choices)
    tested = {flags[flags.index("--train_mode") + 1] if "--train_mode" in flags else "lora" for flags in MODES.values()}
    assert set(ADAPTERS) <= tested


@pytest.mark.parametrize("mode", ["lora", "dora", "qlora", "pissa"])
def test_only_adapter_weights_change_in_training(mode, train, tiny_models, monkeypatch):
    """Base weights stay to the bit; every adapter weight that a gradient reaches moves."""
    import utils.run.save
    import utils.train.trainer

    before, after = {}, {}

    def snapshot(target):
        def take(trainer, *rest):
            target.update({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
            return original[target is after](trainer, *rest)

        return take

    original = (utils.train.trainer.prepare_trainer, utils.run.save.finish_run)
    monkeypatch.setattr(utils.train.trainer, "prepare_trainer", snapshot(before))
    monkeypatch.setattr(utils.run.save, "finish_run", snapshot(after))
    train("--precision", "fp32", "--learning_rate", "1e-2", *MODES[mode])
    adapter = {name for name in before if "lora_" in name or "token_adapter.trainable" in name}
    assert adapter and adapter < set(before)
    for name, start in before.items():
        same = torch.equal(start, after[name])  # 4-bit weights are bytes here
        assert same != (name in adapter), name


def test_lora_is_added_to_every_linear_layer_but_the_head(trained):
    folder = trained()
    weights = load_file(folder / "adapter_model.safetensors")
    adapted = {name.split(".lora_")[0].split(".")[-1] for name in weights if ".lora_" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_lora_target_modules(train, refused, tmp_path, tiny_models, rows_file):
    folder = train("--lora_target_modules", "q_proj,v_proj")
    assert set(json.loads((folder / "adapter_config.json").read_text())["target_modules"]) == {"q_proj", "v_proj"}
    import main_train

    said = refused(
        main_train.main,
        "--model_name_or_path",
        tiny_models(),
        "--train_data_path",
        rows_file,
        "--output_dir",
        str(tmp_path / "other"),
        "--lora_target_modules",
        "q_prj",
    )
    assert "'q_prj'" in said and "q_proj" in said
    assert not (tmp_path / "other").exists()


def test_adapter_flags_reach_the_adapter(train):
    """The saved configuration is PEFT's own record of what was trained."""
    folder = train("--lora_rank", "4", "--lora_alpha", "12", "--lora_dropout", "0.25", "--use_dora", "true",
                   "--use_rslora", "true")  # fmt: skip
    saved = json.loads((folder / "adapter_config.json").read_text())
    expected = {"r": 4, "lora_alpha": 12.0, "lora_dropout": 0.25, "use_dora": True, "use_rslora": True}
    assert {name: saved[name] for name in expected} == expected
