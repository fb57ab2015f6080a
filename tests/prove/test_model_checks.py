"""Proofs on the model and its adapter fail on the fault that each is for."""

import contextlib

import peft
import pytest
from proving import IN_PROCESS, holding

import utils.data.collate
import utils.tasks.sft


def test_full_training_has_no_adapter_proofs_and_learns_to_stop(proved):
    proofs, code = proved("--train_mode", "full")
    assert code == 0
    assert holding(proofs) == dict.fromkeys(IN_PROCESS, True) | {"adapter_off": None, "merged": None}
    assert "no adapter" in proofs["merged"]["does_not_apply"] and proofs["merged"]["measures"] == []
    assert proofs["stops"]["measures"][0]["found"] == 4


@pytest.mark.parametrize("how", [["--train_mode", "qlora"], ["--init_lora_weights", "pissa"], ["--use_dora", "true"],
                                 ["--rope_scaling", "yarn:4"]])  # fmt: skip
def test_every_kind_of_adapter_is_merged(proved, how):
    proofs, code = proved(*how, only=["adapter_off", "merged", "accumulation"])
    pissa = "pissa" in how
    assert code == 0
    assert holding(proofs) == {"accumulation": True, "adapter_off": None if pissa else True, "merged": True}


def test_a_merge_with_the_wrong_scale_is_detected(proved, monkeypatch):
    sound = peft.tuners.lora.layer.Linear.get_delta_weight
    monkeypatch.setattr(
        peft.tuners.lora.layer.Linear, "get_delta_weight", lambda self, adapter: 1.1 * sound(self, adapter)
    )
    proofs, code = proved(only=["adapter_off", "merged"])
    assert code == 1 and holding(proofs) == {"adapter_off": True, "merged": False}


def test_an_adapter_that_cannot_be_disabled_is_detected(proved, monkeypatch):
    monkeypatch.setattr(peft.PeftModel, "disable_adapter", lambda self: contextlib.nullcontext())
    assert holding(proved(only=["adapter_off"])[0]) == {"adapter_off": False}


def test_a_base_that_training_changes_is_detected(proved, monkeypatch):
    sound = utils.tasks.sft.make_trainer

    def planted(*args):
        trainer = sound(*args)
        base = next(weight for name, weight in trainer.model.named_parameters() if name.endswith("base_layer.weight"))
        base.data.mul_(1 + 1e-4)
        return trainer

    monkeypatch.setattr(utils.tasks.sft, "make_trainer", planted)
    assert holding(proved(only=["adapter_off"])[0]) == {"adapter_off": False}


def test_an_adapter_without_effect_proves_nothing(proved, monkeypatch):
    monkeypatch.setattr("utils.prove.subject.Subject.perturb_weights", lambda *_: None)
    assert holding(proved(only=["adapter_off"])[0]) == {"adapter_off": False}


def test_answers_without_a_trained_stop_token_are_detected(proved, monkeypatch):
    sound = utils.tasks.sft.encode_within

    def planted(*args, **options):
        rows = sound(*args, **options)
        for row in rows:
            last = max(place for place, label in enumerate(row["labels"]) if label != -100)
            row["labels"][last] = -100
        return rows

    monkeypatch.setattr(utils.tasks.sft, "encode_within", planted)
    proofs, code = proved("--train_mode", "full", only=["padding_free", "stops"])
    assert code == 1 and holding(proofs) == {"padding_free": True, "stops": False}
