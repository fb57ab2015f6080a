"""Activation checkpointing, which the model's size decides."""

import pytest


@pytest.mark.parametrize(
    ("flags", "on"),
    [([], True), (["--gradient_checkpointing", "false"], False), (["--activation_checkpointing", "false"], False)],
)
def test_large_models_use_activation_checkpointing_unless_a_flag_is_false(flags, on, train, monkeypatch):
    import utils.model.options
    import utils.run.save

    kept = {}
    monkeypatch.setattr(utils.run.save, "finish_run", lambda trainer, *rest: kept.update(trainer=trainer) or {})
    train("--max_steps", "1", *flags, output="small")
    assert not kept["trainer"].model.is_activation_checkpointing
    monkeypatch.setattr(utils.model.options, "CHECKPOINTING_FROM", 1)
    train("--max_steps", "1", *flags, output="large")
    assert kept["trainer"].model.is_activation_checkpointing == kept["trainer"].args.gradient_checkpointing == on
