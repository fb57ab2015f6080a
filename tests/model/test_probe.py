"""Which layouts a model computes correctly, found on the model itself."""

import pytest
import tiny
import torch
from small_models import LAYOUTS, small

from utils.data.collate import build_pair_collator
from utils.data.row_types import CONVERSATION, PAIR
from utils.model.probe import NOT_INPUTS, example_rows, probe

# heed positions; ignore them; carry a state; raise for want of a kernel; see what comes
RIGHT = ("qwen2", "llama", "gemma2", "gemma3_text", "phi3", "mistral", "cohere", "mixtral")
LEAKS = ("gpt_oss", "opt", "falcon", "bloom", "mamba", "rwkv", "jamba")
RAISES = ("lfm2", "bamba", "qwen3_next")


@pytest.mark.parametrize("kind", RIGHT)
def test_rows_end_to_end_are_computed_correctly(kind, tokenizer):
    found = probe(small(kind), LAYOUTS, example_rows(tokenizer, CONVERSATION))
    assert (found.fails, found.not_causal, found.padded, found.end_to_end) == (None,) * 4
    assert found.differences["end_to_end"] < 1e-5


@pytest.mark.parametrize("kind", LEAKS + RAISES)
def test_rows_end_to_end_are_computed_wrongly(kind, tokenizer):
    found = probe(small(kind), LAYOUTS, example_rows(tokenizer, CONVERSATION))
    assert found.padded is None
    assert ("see each other" if kind in LEAKS else "cannot compute") in found.end_to_end


def test_a_model_that_is_not_causal_is_found(tokenizer):
    assert "not causal" in probe(small("bert"), LAYOUTS, example_rows(tokenizer, CONVERSATION)).not_causal


@pytest.mark.parametrize("kind", ["gpt_oss", "mamba", "qwen2"])
def test_pairs_are_laid_out_by_their_own_collator(kind, tokenizer):
    layouts = {"padded": build_pair_collator(0, False), "end_to_end": build_pair_collator(0, True)}
    found = probe(small(kind), layouts, example_rows(tokenizer, PAIR))
    assert found.padded is None
    assert (found.end_to_end is None) == (kind == "qwen2")


def test_a_small_leak_is_found_in_bf16(tokenizer, monkeypatch):
    """Weights too many for float32: what 16 bits would hide shows where other tokens of another row change anything."""
    monkeypatch.setattr("utils.model.probe_state.FLOAT32_UP_TO", 0)
    model = small("falcon")
    for name, weight in model.named_parameters():
        if name.endswith("self_attention.dense.weight"):
            weight.data.mul_(0.01)  # attention adds little, and so does what leaks through it
    rows = example_rows(tokenizer, CONVERSATION)
    batch = {name: value for name, value in LAYOUTS["end_to_end"](rows).items() if name not in NOT_INPUTS}
    with torch.no_grad():
        found = model(**batch, use_cache=False).logits[0, 9:23]
        alone = model(input_ids=batch["input_ids"][:, 9:23], use_cache=False).logits[0]
    assert 1e-4 < (found - alone).abs().max() / alone.abs().max() < 0.02  # in float32; bf16 rounds off as much
    assert probe(model.bfloat16(), LAYOUTS, rows).end_to_end


def test_bf16_does_not_count_as_a_leak(tokenizer, monkeypatch):
    monkeypatch.setattr("utils.model.probe_state.FLOAT32_UP_TO", 0)
    for kind in ("qwen2", "mixtral"):
        found = probe(small(kind).bfloat16(), LAYOUTS, example_rows(tokenizer, CONVERSATION))
        assert (found.not_causal, found.padded, found.end_to_end) == (None,) * 3


@pytest.mark.parametrize("kind", ["axk2", "doge"])
def test_sparse_attention_over_all_rows_of_a_step(kind, tokenizer):
    """Its indexer takes the best of all tokens that are there, also of those it may not see."""
    model = small(kind)
    span = model.config.index_topk if kind == "axk2" else model.config.keep_window_size
    found = probe(model, LAYOUTS, example_rows(tokenizer, CONVERSATION))
    assert found.padded is None and found.not_causal is None
    assert f"where they are more than {span:,}" in found.end_to_end and found.longest == span


def test_not_inputs_are_all_that_a_collator_adds():
    """What a collator adds is no input of the model, and all else is."""
    batch = build_pair_collator(0, True)(example_rows(tiny.byte_level_tokenizer(), PAIR))
    assert set(batch) - NOT_INPUTS == {
        "input_ids", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx",
    }  # fmt: skip
