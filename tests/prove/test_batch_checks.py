"""Proofs on batches fail on the fault that each is for."""

import tiny
import torch
from conftest import write_rows
from proving import holding
from transformers import Trainer

import utils.data.collate
import utils.tasks.sft


def test_plain_text_is_packed_without_splits(proved, tmp_path):
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": text * n} for n, text in enumerate(tiny.TEXT[:4], 1)])
    recipe = ["--train_args_path", "train_args/pretrain/base.py", "--train_data_path", texts, "--max_len", "400"]
    proofs, code = proved(*recipe, only=["padding_free", "packed", "stops"])
    assert code == 0 and holding(proofs) == {"padding_free": True, "packed": True, "stops": None}


def test_positions_that_do_not_restart_are_detected(proved, monkeypatch):
    sound = utils.data.collate._with_sources

    def planted(collate):
        def forgetful(rows):
            batch = sound(collate)(rows)
            if "position_ids" in batch:
                batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
            return batch

        return forgetful

    monkeypatch.setattr(utils.data.collate, "_with_sources", planted)
    proofs, code = proved(only=["padding_free", "packed", "accumulation"])
    # the probe sees it too, and a run would pad its rows
    assert holding(proofs) == {"padding_free": None, "packed": None, "accumulation": True}
    assert "see each other" in proofs["padding_free"]["does_not_apply"]


def test_a_mean_of_means_is_detected(proved, monkeypatch):
    monkeypatch.setattr(Trainer, "_get_num_items_in_batch", lambda *_: None)
    proofs, code = proved(only=["padding_free", "packed", "accumulation"])
    assert code == 1 and holding(proofs) == {"padding_free": True, "packed": True, "accumulation": False}
