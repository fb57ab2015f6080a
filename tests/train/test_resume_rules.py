"""Each setting of a recipe has one rule for a resumed run."""

import dataclasses

import pytest

from train_args.dpo.base import TrainArgument as DPOArgument
from train_args.sft.base import TrainArgument as SFTArgument
from utils.train.resume_rules import FIXED, FREE, LIVE, OPTIONS, ORDER, SCHEDULE, SIZES, UPDATED, rule_of


def test_no_setting_has_two_rules():
    names = [*ORDER, *FIXED, *SIZES, *UPDATED, *LIVE, *FREE]
    assert len(names) == len(set(names)) and set(UPDATED) == {*OPTIONS, *SCHEDULE}


@pytest.mark.parametrize(("name", "rule"), [
    ("seed", "order"), ("optim_args", "fixed"), ("gradient_accumulation_steps", "sizes"), ("learning_rate", "updated"),
    ("max_steps", "updated"), ("max_grad_norm", "live"), ("beta", "live"), ("logging_steps", None),
    ("save_steps", None), ("output_dir", None), ("a_field_that_a_recipe_adds", "live"),
])  # fmt: skip
def test_rules(name, rule):
    assert rule_of(name) == rule


@pytest.mark.parametrize("kind", [SFTArgument, DPOArgument])
def test_settings_with_a_rule_are_settings_of_a_recipe(kind):
    """A name that transformers or TRL no longer has would be a rule for nothing."""
    fields = {field.name for kind in (SFTArgument, DPOArgument) for field in dataclasses.fields(kind)}
    assert {*ORDER, *FIXED, *UPDATED, *LIVE} <= fields
    assert [name for name in (field.name for field in dataclasses.fields(kind)) if rule_of(name) == "order"] == [
        name for name in (field.name for field in dataclasses.fields(kind)) if name in ORDER
    ]
