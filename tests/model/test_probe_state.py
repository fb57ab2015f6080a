"""The state a model is probed in: no random experts, short windows, and everything restored afterwards."""

import pytest
import tiny
import torch
from small_models import LAYOUTS, small
from transformers import AutoModelForCausalLM

from utils.data.row_types import CONVERSATION
from utils.model.probe import example_rows, probe


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("jitter", ["known", "unknown"])
def test_a_router_with_random_experts_is_no_leak(seed, jitter, tokenizer, monkeypatch):
    """Phi-3.5-MoE draws experts in training mode, often the same ones twice: no verdict may depend on the seed."""
    if jitter == "unknown":  # under a name that is not set to 0
        monkeypatch.setattr("utils.model.probe_state._RATES", ())
    model = small("phimoe")
    torch.manual_seed(seed)
    found = probe(model, LAYOUTS, example_rows(tokenizer, CONVERSATION))
    assert (found.fails, found.not_causal, found.padded, found.end_to_end) == (None,) * 4
    assert [layer.mlp.router.router_jitter_noise for layer in model.model.layers] == [0.01, 0.01]  # put back


def test_the_model_and_the_random_state_are_restored(tokenizer):
    model = AutoModelForCausalLM.from_config(
        tiny.config_for("mistral", 600, sliding_window=100, attention_dropout=0.1), dtype=torch.bfloat16
    )
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = torch.random.get_rng_state()
    probe(model, LAYOUTS, example_rows(tokenizer, CONVERSATION))
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, weight in model.state_dict().items():
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, before[name])
    assert model.config.sliding_window == 100
    assert {module.attention_dropout for module in model.modules() if hasattr(module, "attention_dropout")} == {0.1}


def test_windows_are_shortened_for_the_probe(tokenizer):
    """A window that counted from the start of the step, not of the row, would show."""
    model = small("mistral")
    model.config.sliding_window = 4096
    seen = []
    forward = model.forward
    model.forward = lambda *args, **kwargs: seen.append(model.config.sliding_window) or forward(*args, **kwargs)
    probe(model, LAYOUTS, example_rows(tokenizer, CONVERSATION))
    assert set(seen) == {4096, 4} and model.config.sliding_window == 4096
