"""`--deepspeed` before the trainer's arguments are built: names, the launcher's default, files that cannot be used."""

import json
import os
from types import SimpleNamespace

import pytest

from utils.config.deepspeed import CONFIGS, resolve, short_name, validate


@pytest.fixture
def settings_of(monkeypatch):
    """The settings of a value of `--deepspeed`; the environment of a single process is not kept."""
    monkeypatch.setattr(os, "environ", dict(os.environ) | {"RANK": "0"})

    def build(given):
        values = {"deepspeed": given, "optim": "adamw_torch"}
        return SimpleNamespace(values=dict(values), requested=values)

    return build


@pytest.mark.parametrize(
    ("given", "resolved"),
    [(None, None), ("none", None), ("", None), ("zero3", str(CONFIGS / "ds_config_zero3.json")), ("zero9", None)],
)
def test_a_name_becomes_its_file(settings_of, given, resolved):
    settings = settings_of(given)
    resolve(settings)
    assert settings.values["deepspeed"] == resolved
    assert [problem.flags for problem in validate(settings)] == ([("deepspeed",)] if given == "zero9" else [])


def test_the_launchers_default(settings_of, monkeypatch):
    settings = settings_of(None)
    monkeypatch.setitem(os.environ, "CROSS_SIZE", "1")  # DeepSpeed's launcher
    resolve(settings)
    assert short_name(settings.values["deepspeed"]) == "zero2"


def test_a_section_that_would_replace_a_flag(settings_of, tmp_path):
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}, "optimizer": {"type": "Adam"}}))
    settings = settings_of(str(file))
    resolve(settings)
    (problem,) = validate(settings)
    assert settings.values["deepspeed"] is None  # the trainer's arguments can still be built
    assert problem.flags == ("deepspeed", "optim") and problem.code == "DEEPSPEED_SHADOWS"
    assert "would replace --optim adamw_torch" in str(problem)
