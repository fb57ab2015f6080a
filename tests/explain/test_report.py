"""The printed explanation, as text and as JSON."""

import json
from types import SimpleNamespace

import pytest
from conftest import ROOT
from explaining import EVAL, FULL, printed

from utils.explain.report import _steps


def test_the_text_has_the_plan_and_where_values_come_from(flags_for, capsys):
    text = printed(capsys, *flags_for(*FULL, "--lora_rank", "8", "--num_train_epochs", "3", *EVAL))
    plan, *rest = text.split("\n\n")
    assert "3 updates = 3 epochs of 1 (--num_train_epochs)" in plan and "6 of 8 train, 2 evaluate" in plan
    assert "6 examples (1 process × 1 pass × 6 rows)" in plan
    flags = next(part for part in rest if part.startswith("Values: flags"))
    assert "--lora_rank 8" in flags
    recipe = next(part for part in rest if part.startswith("Values: the recipe"))
    assert "learning_rate" in recipe and "train_args/sft/base.py:" in recipe
    assert not any(part.startswith("Values: the libraries'") for part in rest)
    assert "lora_rank 8 (--lora_rank 8)\n    --train_mode full trains every weight" in text
    assert "train_special_tokens" not in text  # nobody set it, and it has no effect
    everything = printed(capsys, *flags_for(*FULL), "--all", "true")
    assert "adam_beta1" in everything and "transformers' TrainingArguments" in everything
    assert "token" not in {line.split()[0].rpartition("_")[2] for line in everything.splitlines() if line.split()}


def test_the_json_has_every_value(flags_for, capsys):
    found = json.loads(printed(capsys, *flags_for("--lora_rank", "8"), "--json", "true", "--processes", "2"))
    assert found["plan"]["processes"] == 2 and found["task"] == "sft" and "steps" not in found["plan"]["logging"]
    assert found["values"]["lora_rank"] == {"value": 8, "kind": "flag", "from": "--lora_rank 8", "idle": None}
    assert found["values"]["max_prompt_length"]["idle"] and found["values"]["adam_beta1"]["kind"] == "library"
    assert all("kind" in value for value in found["values"].values())


def test_a_recipes_line_without_a_type_is_named(flags_for, capsys, tmp_path):
    recipe = tmp_path / "mine.py"
    recipe.write_text((ROOT / "train_args/sft/base.py").read_text() + "    adam_beta1 = 0.5\n")
    text = printed(capsys, *flags_for("--train_args_path", str(recipe)))
    line = len(recipe.read_text().splitlines())
    assert f"adam_beta1 at {recipe}:{line}\n    it has no type annotation" in text


@pytest.mark.parametrize(
    ("steps", "epochs", "line"), [(1, 1.0, "1 update = 1 epoch of 4"), (6, 1.5, "6 updates = 1.5 epochs of 4")]
)
def test_one_update_is_written_without_s(steps, epochs, line):
    explained = SimpleNamespace(
        plan={"steps": steps, "epochs": epochs, "updates_per_epoch": 4},
        train_args=SimpleNamespace(max_steps=-1, resume_from_checkpoint=None),
    )
    assert _steps(explained) == f"{line} (--num_train_epochs)"
