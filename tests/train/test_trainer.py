"""The trainer's optimizer: LoRA+ gives B a learning rate of its own."""

import pytest


def test_loraplus_learning_rates_equal_pefts(train, monkeypatch):
    """Learning rates by parameter: B sixteen times A's, as PEFT's own function builds them; both decay alike."""
    import utils.run.save

    kept = {}
    monkeypatch.setattr(utils.run.save, "finish_run", lambda trainer, *rest: kept.update(trainer=trainer) or {})
    train(
        "--loraplus_lr_ratio", "16", "--learning_rate", "1e-3", "--lr_scheduler_type", "constant", "--warmup_steps",
        "0", "--weight_decay", "0.125",
    )  # fmt: skip
    trainer = kept["trainer"]
    rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert decays[id(parameter)] == 0.125, name
            assert rates[id(parameter)] == pytest.approx(1.6e-2 if "lora_B" in name else 1e-3), name
