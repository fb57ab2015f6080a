"""Which rows of the embeddings are untrained, and when they are trained beside the adapter."""

import json

import pytest
import tiny
import torch
from modes import base_with_untrained, logits_of
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from utils.model.special_tokens import impossible_tokens, untrained_tokens


@pytest.mark.parametrize(
    ("tied", "precision", "how"),
    [(True, "fp32", "zero"), (True, "fp32", "drift"), (False, "fp32", "drift"), (False, "bf16", "zero")],
)
def test_untrained_special_tokens_are_found_and_trained(tied, precision, how, train, tmp_path, tokenizer):
    """Rows as training leaves those it never meets are found and move; no other row does."""
    tokens = tokenizer.convert_tokens_to_ids(tiny.CHAT_TOKENS)
    folder = base_with_untrained(tmp_path / "base", tokenizer, tokens, how, tied)
    run = train("--learning_rate", "1e-2", "--precision", precision, model=folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trained = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trained = PeftModel.from_pretrained(trained, run).merge_and_unload()
    for layer in ("get_input_embeddings", "get_output_embeddings"):
        moved = (getattr(trained, layer)().weight - getattr(base, layer)().weight).abs().sum(-1) > 0
        assert torch.nonzero(moved).flatten().tolist() == sorted(tokens), layer
    off = train("--train_special_tokens", "off", "--max_steps", "1", model=folder, output="off")
    assert json.loads((off / "adapter_config.json").read_text())["trainable_token_indices"] is None


@pytest.mark.parametrize(("choice", "trained"), [("auto", None), ("on", {"embed_tokens": [1, 2]})])
def test_trained_special_tokens_are_trained_further_only_with_on(choice, trained, train, tmp_path, tokenizer):
    folder = base_with_untrained(tmp_path / "base", tokenizer, [], "drift", True)
    run = train("--train_special_tokens", choice, model=folder)
    found = json.loads((run / "adapter_config.json").read_text())["trainable_token_indices"]
    assert (found and {name: sorted(ids) for name, ids in found.items()}) == trained


def model_of_rows(tokenizer, embedding: dict, head: dict, impossible: tuple):
    """A model whose two matrices have rows of norm 5, in any directions but for the first axis, and some others.

    Args:
        embedding, head: id → the first two numbers of its row, or a factor for the row.
        impossible: in turns the first number of the rows that no text can have; their others are 0.
    """
    config = tiny.config_for("qwen2", len(tokenizer) + 3, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config)
    never = impossible_tokens(tokenizer, len(tokenizer) + 3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        layers = (model.get_input_embeddings(), model.get_output_embeddings())
        for layer, changes in zip(layers, (embedding, head), strict=True):
            rows = torch.randn(layer.weight.shape, generator=generator)
            rows[:, 0] = 0
            rows *= 5 / rows.norm(dim=-1, keepdim=True)
            for token, change in changes.items():
                rows[token] *= change if isinstance(change, float) else 0
                rows[token, :2] += torch.tensor(change) if isinstance(change, tuple) else 0
            rows[never] = 0
            rows[never, 0] = torch.tensor(impossible * len(never))[: len(never)]
            layer.weight.copy_(rows)
    return model, set(never)


def test_impossible_tokens_are_bytes_no_text_has_and_rows_beyond_the_vocabulary(tokenizer):
    names = [chr(byte) for byte in (0xC0, 0xC1, *range(0xF5, 0x100))]
    expected = [tokenizer.get_vocab()[name] for name in names]
    assert impossible_tokens(tokenizer, len(tokenizer)) == expected
    size = max(tokenizer.get_vocab().values()) + 1
    assert impossible_tokens(tokenizer, size + 3) == [*expected, size, size + 1, size + 2]
    words = tiny.sentencepiece_tokenizer()
    assert words.convert_ids_to_tokens(impossible_tokens(words, len(words)))[:3] == ["<0xC0>", "<0xC1>", "<0xF5>"]


def test_rows_of_nearly_zero_norm_are_untrained_in_either_matrix(tokenizer):
    """Below a hundredth of the median's norm, far from the impossible rows as they are; a fiftieth is trained."""
    changes = {20: 0.0099, 22: 0.02}, {21: 0.0099, 23: 0.02}
    model, never = model_of_rows(tokenizer, *changes, impossible=(5.0,))
    assert untrained_tokens(model, tokenizer) - never == {20, 21}


def test_rows_near_those_of_impossible_tokens_are_untrained(tokenizer):
    """These lie at 0.9 and 1.1 of one axis, as a softmax pushes them: at most 0.1 from their mean, and a tenth more."""
    rows = {30: (1.0, 0.109), 31: (1.0, 0.111), 32: (1.109, 0.0), 33: (0.889, 0.0)}
    model, never = model_of_rows(tokenizer, rows, {}, impossible=(0.9, 1.1))
    assert untrained_tokens(model, tokenizer) - never == {30, 32}


def test_rows_smaller_than_those_of_impossible_tokens_are_trained(tokenizer):
    """These are as they began, of norm 1 in all directions: what is as near to 0 and smaller by a fifth has moved."""
    rows = {40: (0.0, 0.79), 41: (0.0, 0.81), 42: (0.0, 1.09), 43: (0.0, 1.11)}
    model, never = model_of_rows(tokenizer, {}, rows, impossible=(1.0, -1.0))
    assert untrained_tokens(model, tokenizer) - never == {41, 42}


def test_rows_of_a_head_with_a_bias_cannot_be_trained(tiny_models, rows_file, tmp_path, refused):
    """PEFT's layer for them computes W h: a model with a bias would have other logits, by more than 1 here."""
    import main_train

    base = AutoModelForCausalLM.from_pretrained(tiny_models("phi_bias"), dtype=torch.float32)
    expected = logits_of(base)
    rows = {"embed_tokens": [5], "lm_head": [5]}
    of_peft = logits_of(get_peft_model(base, LoraConfig(target_modules=["q_proj"], trainable_token_indices=rows)))
    assert (of_peft - expected).abs().max() > 1, "PEFT keeps the bias now: nothing has to be refused any more"
    flags = ["--model_name_or_path", tiny_models("phi_bias"), "--train_data_path", rows_file, "--report_to", "none"]
    out = refused(main_train.main, *flags, "--output_dir", str(tmp_path / "run"), "--train_special_tokens", "on")
    assert "the embeddings of <|im_end|>, <|im_start|> are to be trained" in out
    assert "bias that the head of PhiForCausalLM has" in out and "--train_special_tokens off" in out
