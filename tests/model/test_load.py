"""Loading a base: the dtype of its weights, and which attention it computes with."""

from itertools import pairwise

import pytest
import torch
from loguru import logger
from modes import IDS
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from utils.data.collate import build_collator, build_pair_collator
from utils.model.load import resolve_attention
from utils.runtime.log import setup_logging


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_full_training_starts_from_the_base_weights_bit_for_bit(precision, train, tiny_models):
    """To the bit, in float32: loaded in the arithmetic's bf16, each would have lost 16 of its bits."""
    run = train("--train_mode", "full", "--precision", precision, "--learning_rate", "0", "--max_steps", "1")
    before, after = load_file(f"{tiny_models()}/model.safetensors"), load_file(run / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_full_training_keeps_float32_weights_under_bf16(train):
    weights = load_file(train("--train_mode", "full", "--precision", "bf16") / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_attn_implementation_reaches_the_model(train, monkeypatch):
    import utils.run.save

    kept = {}
    monkeypatch.setattr(utils.run.save, "finish_run", lambda trainer, *rest: kept.update(trainer=trainer) or {})
    train("--attn_implementation", "eager")
    assert kept["trainer"].model.config._attn_implementation == "eager"


@pytest.fixture
def loaded(tiny_models):
    return AutoModelForCausalLM.from_pretrained(tiny_models(), dtype=torch.bfloat16)


@pytest.fixture
def with_flash(monkeypatch):
    """A machine that has flash attention, as far as it is asked."""
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


def settled(model, precision="bf16", device="cuda"):
    """What `auto` makes of the attention, and what the log says of it."""
    said = []
    setup_logging()  # which also takes what transformers warns of
    sink = logger.add(said.append, format="{message}")
    resolve_attention(model, precision, torch.device(device))
    logger.remove(sink)
    assert len(said) == 1
    return model.config._attn_implementation, str(said[0]).strip()


def test_auto_uses_flash_attention_where_it_is_available(loaded, with_flash, monkeypatch):
    def adjust(self, wanted, **_):
        logging.get_logger("transformers").warning("the weights are float32")  # no false alarm reaches the log
        return wanted

    monkeypatch.setattr(type(loaded), "_check_and_adjust_attn_implementation", adjust)
    told = logging.get_verbosity()
    assert settled(loaded) == ("flash_attention_2", "attention is flash_attention_2")
    assert logging.get_verbosity() == told


@pytest.mark.parametrize(
    ("lacking", "options", "reason"),
    [
        (None, {"device": "cpu"}, "CUDA device"),
        (("transformers.utils.is_flash_attn_2_available", lambda: False), {}, "flash-attn is not installed"),
        (None, {"precision": "fp32"}, "bf16 and fp16"),
        (("torch.cuda.get_device_capability", lambda *_: (7, 5)), {}, "older than Ampere"),
        (("transformers.Qwen2ForCausalLM._supports_flash_attn", False), {}, "Qwen2ForCausalLM does not support"),
        (("transformers.Qwen2ForCausalLM._compatible_flash_implementations", ["a/kernel"]), {}, "does not support"),
        (("transformers.Qwen2ForCausalLM._can_set_attn_implementation", lambda *_: False), {}, "does not support"),
        # the package itself is not here, so transformers raises: auto goes on all the same
        (None, {}, "ImportError"),
    ],
)
def test_auto_logs_why_flash_attention_is_not_used(lacking, options, reason, loaded, with_flash, monkeypatch):
    if lacking:
        monkeypatch.setattr(*lacking, raising=False)
    found, said = settled(loaded, **options)
    assert found == "sdpa" and said.startswith("attention is sdpa (no flash attention: ") and reason in said
    loaded(IDS)


def test_heads_too_large_for_flash_attention(tiny_models, with_flash):
    model = AutoModelForCausalLM.from_pretrained(tiny_models("llama", head_dim=320))
    assert settled(model) == (
        "sdpa",
        "attention is sdpa (no flash attention: its heads have 320 dimensions, more than 256)",
    )


def plain_varlen(query, key, value, cu_seqlens_q, cu_seqlens_k, softmax_scale=None, **_):
    """flash_attn_varlen_func written out: each row by itself; [tokens, heads, size] each."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    rows = []
    for start, end in pairwise(cu_seqlens_q.tolist()):
        states = [part[start:end].transpose(0, 1) for part in (query, key, value)]
        options = {"is_causal": True, "scale": softmax_scale, "enable_gqa": True}
        rows.append(torch.nn.functional.scaled_dot_product_attention(*states, **options).transpose(0, 1))
    return torch.cat(rows)


@pytest.mark.parametrize("collator", ["sft", "pairs"])
def test_flash_attention_computes_rows_of_a_packed_batch_separately(collator, tiny_models, monkeypatch):
    """What either collator makes goes to the variable-length kernel, and each row is as if it were alone."""
    import transformers.modeling_flash_attention_utils as of_flash

    def no_kernel(*_, **__):
        raise AssertionError("the rows were taken for one")

    def scale_alone(softmax_scale=None, **_):
        return {"softmax_scale": softmax_scale}

    functions = ((no_kernel, plain_varlen, None, None, None), (scale_alone, None))
    monkeypatch.setattr(of_flash, "lazy_import_flash_attention", lambda *_: functions)
    model = AutoModelForCausalLM.from_pretrained(tiny_models(), dtype=torch.float32).eval()
    rows = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    if collator == "sft":
        batch = build_collator(0, padding_free=True)([{"input_ids": row, "labels": row} for row in rows])
    else:
        pair = {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]}
        batch = build_pair_collator(0, padding_free=True)([{**pair, "chosen_labels": [7], "rejected_labels": [8, 9]}])
        rows = [[5, 6, 7], [5, 6, 8, 9]]
    batch = {name: value for name, value in batch.items() if name not in ("labels", "source", "row")}
    with torch.inference_mode():
        alone = torch.cat([model(torch.tensor([row])).logits[0] for row in rows])
        model.config._attn_implementation_internal = "flash_attention_2"
        together = model(**batch, use_cache=False).logits[0]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
