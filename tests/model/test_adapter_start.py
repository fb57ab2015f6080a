"""The weights with which an adapter's training begins, and their dtype."""

import pytest
import tiny
import torch
from modes import logits_of
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from small_models import small
from transformers import AutoModelForCausalLM

from utils.model.adapter_start import adapter_weights, prepare_trainable_weights
from utils.runtime.errors import UserError


@pytest.mark.parametrize("keep_dtype", [False, True], ids=["float32", "the weights' type"])
def test_a_loaded_adapter_starts_with_the_weights_of_its_file(keep_dtype, tiny_models):
    """And the copy of it that is DPO's reference: both as the files had them, not rounded on the way."""
    base = AutoModelForCausalLM.from_pretrained(tiny_models(), dtype=torch.float32)
    rows = {"embed_tokens": [5, 9]}
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, trainable_token_indices=rows)
    model = get_peft_model(base, config)
    model.add_adapter("ref", config)
    start = adapter_weights(model)
    assert len(start) == 5 and not any(".ref" in name for name in start)
    weights = dict(model.named_parameters())
    dtype = torch.bfloat16 if keep_dtype else torch.float32
    for name in start:
        weights[name].data = weights[name].data.bfloat16()
    prepare_trainable_weights(model, keep_dtype=keep_dtype, start=start)
    for name, value in start.items():
        assert torch.equal(weights[name], value.to(dtype)) and weights[name].dtype == dtype, name
        assert torch.equal(weights[name.replace(".default", ".ref")], value.to(dtype)), name


@pytest.mark.parametrize("keep_dtype", [False, True], ids=["float32", "the weights' type"])
def test_adapters_are_float32_and_token_rows_start_as_the_base_has_them(keep_dtype, tiny_models):
    """Whatever they were rounded to on the way: TRL makes QLoRA's adapters bf16, which a float32 row is not."""
    base = AutoModelForCausalLM.from_pretrained(tiny_models(), dtype=torch.float32)
    expected = logits_of(base)
    rows = {"embed_tokens": [5, 9]}
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], trainable_token_indices=rows))
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(trained) == 5  # A and B of two layers, and the rows
    for weight in trained.values():
        weight.data = weight.data.bfloat16()
    rounded = {name: weight.detach().clone() for name, weight in trained.items()}
    prepare_trainable_weights(model, keep_dtype=keep_dtype, start=None)
    assert {weight.dtype for weight in trained.values()} == {torch.bfloat16 if keep_dtype else torch.float32}
    for name, weight in trained.items():
        if "trainable_tokens" in name:
            embedding = load_file(f"{tiny_models()}/model.safetensors")["model.embed_tokens.weight"][[5, 9]]
            assert torch.equal(weight, embedding.to(weight.dtype))
            assert torch.equal(weight, rounded[name]) == keep_dtype
        else:
            assert torch.equal(weight, rounded[name].to(weight.dtype))
    if not keep_dtype:
        assert torch.equal(logits_of(model), expected)


def test_a_head_with_trained_rows_has_the_attribute_bias():
    """TRL's fused loss reads it; without it each step would go through the whole logits instead."""
    base = AutoModelForCausalLM.from_config(tiny.config_for("qwen2", 500, tie_word_embeddings=False))
    rows = {"embed_tokens": [5], "lm_head": [5]}
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], trainable_token_indices=rows))
    head = model.get_output_embeddings()
    with pytest.raises(AttributeError):
        head.bias  # noqa: B018
    prepare_trainable_weights(model, keep_dtype=False, start=None)
    assert head.bias is None


def test_a_new_adapter_that_changes_the_model_is_refused():
    """Inkling normalises what its embedding looks up, which PEFT leaves out where it trains rows of it."""
    from peft import LoraConfig, get_peft_model

    from utils.model.adapter_start import check_new_adapter

    plain = LoraConfig(target_modules=["q_proj"])
    check_new_adapter(get_peft_model(small("qwen2"), plain))
    rounded = LoraConfig(target_modules=["q_proj"], use_dora=True)  # its magnitudes are rounded as the weights are
    check_new_adapter(get_peft_model(small("qwen2").bfloat16(), rounded))
    rows = LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5, 7, 14]})
    check_new_adapter(get_peft_model(small("gemma3_text"), rows))  # PEFT knows its scaled embedding
    model = get_peft_model(small("qwen2"), rows)
    embedding = model.get_base_model().model.embed_tokens.original_module
    embedding.forward = lambda ids: torch.nn.functional.normalize(
        torch.nn.functional.embedding(ids, embedding.weight), dim=-1
    )
    with pytest.raises(UserError, match="--train_special_tokens off"):
        check_new_adapter(model)
