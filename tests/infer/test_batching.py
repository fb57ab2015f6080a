"""Which prompts a model answers correctly in one batch, found on the model itself."""

import pytest
import torch
from small_models import small
from test_generate import all_answers, argmax_loop, ids_of, make

from utils.infer.batching import Batching, batching_of

LENGTHS = [3, 17, 17, 9, 3]
# count positions from the padding; mix the rows of a batch in their state; neither
EQUAL, SINGLE, ANY = ("bart", "blenderbot"), ("rwkv",), ("qwen2", "gpt2", "mamba", "opt")


def sharp(kind):
    """A small model whose likeliest token is clearly so, without a stop token."""
    model = small(kind).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
    model.generation_config.eos_token_id = []
    return model


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(kind, found) for found, kinds in zip(Batching, (ANY, EQUAL, SINGLE), strict=True) for kind in kinds],
)
def test_answers_are_those_of_each_prompt_alone(kind, expected, tokenizer):
    model, prompts = sharp(kind), ids_of(LENGTHS)
    assert batching_of(model, prompts) is expected
    found = all_answers(model, tokenizer, prompts, 8, max_new_tokens=6)
    assert found == [tokenizer.decode(argmax_loop(model, prompt, 6), skip_special_tokens=True) for prompt in prompts]


def test_a_model_is_tested_once_and_unchanged_afterwards(tokenizer, monkeypatch):
    model, prompts, calls = make("qwen2"), ids_of(LENGTHS), []
    before, config = {name: weight.clone() for name, weight in model.state_dict().items()}, model.generation_config
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **options: calls.append(1) or generate(**options))
    random = torch.random.get_rng_state()
    assert [batching_of(model, prompts) for _ in range(3)] == [Batching.ANY] * 3
    assert len(calls) == 3 and not model.training and model.generation_config is config
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(("kind", "expected"), [("qwen2", Batching.ANY), ("bart", Batching.EQUAL)])
def test_rounding_to_16_bits_is_no_difference(kind, expected, monkeypatch):
    """Of weights too many for float32."""
    monkeypatch.setattr("utils.model.probe_state.FLOAT32_UP_TO", 0)
    assert batching_of(sharp(kind).bfloat16(), ids_of(LENGTHS)) is expected
