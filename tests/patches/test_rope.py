"""Rows of very different lengths in one step, where the position codes depend on the longest: against rows alone."""

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from utils.data.collate import NOT_INPUTS, build_collator
from utils.patches.rope import use_row_rope

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "long_factor": [4.0] * 8,
    "short_factor": [1.0] * 8,
    "original_max_position_embeddings": 16,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
KINDS = {
    "longrope": ("phi3", {"rope_parameters": LONGROPE, "max_position_embeddings": 64}),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 16}),
}
ROWS = [{"input_ids": list(range(5, 5 + length)), "labels": list(range(5, 5 + length))} for length in (9, 40, 25, 12)]


def model_of(kind):
    """A random model whose attention depends on positions enough to see a difference."""
    torch.manual_seed(0)
    architecture, changes = KINDS[kind]
    config = tiny.config_for(architecture, 200, initializer_range=0.2, original_max_position_embeddings=16, **changes)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding_free", [True, False])
def test_each_row_has_the_positions_it_has_alone(kind, padding_free):
    model = model_of(kind)
    # a fresh model a row: a dynamic one remembers the longest
    alone = [model_of(kind)(torch.tensor([row["input_ids"]])).logits[0] for row in ROWS]
    batch = build_collator(0, padding_free)(ROWS)
    inputs = {name: value for name, value in batch.items() if name not in NOT_INPUTS}
    far = float((_rows(model(**inputs, use_cache=False).logits, padding_free)[0] - alone[0]).abs().max().detach())
    assert far > 1e-3  # what transformers does by itself
    use_row_rope(model)
    for found, expected in zip(_rows(model(**inputs, use_cache=False).logits, padding_free), alone, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def _rows(logits, padding_free):
    lengths = [len(row["input_ids"]) for row in ROWS]
    if padding_free:
        return logits[0].split(lengths)
    return [row[:length] for row, length in zip(logits, lengths, strict=True)]


def test_other_models_stay_as_they_are():
    model = AutoModelForCausalLM.from_config(tiny.config_for("llama", 200))
    use_row_rope(model)
    assert not model.base_model._forward_pre_hooks
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_choices_of_other_lengths_have_the_likelihoods_they_have_alone(kind, tmp_path):
    """Multiple choice puts short and long choices into one batch; against log_softmax of each alone."""
    from utils.evaluate.multiple_choice import Scored, log_likelihoods
    from utils.infer.load import Parts, TrainedArgs, load_trained

    model_of(kind).save_pretrained(tmp_path)
    model = load_trained(TrainedArgs(model_path=str(tmp_path)), Parts(str(tmp_path), ()), "float32")
    scored = [Scored(row["input_ids"], 4) for row in ROWS]
    found = dict(log_likelihoods(model, scored, 4, 0))
    for place, row in enumerate(ROWS):
        ids = torch.tensor([row["input_ids"]])
        logits = model_of(kind)(ids, use_cache=False).logits[0, 3:-1].log_softmax(-1)
        expected = float(logits.gather(1, ids[0, 4:, None]).sum().detach())
        assert found[place] == pytest.approx(expected, rel=1e-4)
