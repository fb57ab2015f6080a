"""Recipes: which files are one, and the flags that others replace."""

import pytest
from conftest import ROOT
from parsing import problems_of
from transformers import HfArgumentParser

from utils.config.recipe import REPLACED_FLAGS, load_recipe
from utils.runtime.errors import UserError


@pytest.mark.parametrize("recipe", sorted(str(p) for p in (ROOT / "train_args").glob("*/*.py")))
def test_every_recipes_fields_keep_help_and_choices(recipe):
    parser = HfArgumentParser(load_recipe(recipe))
    inherited = HfArgumentParser(load_recipe(recipe).__mro__[1])
    for action in inherited._actions:
        if action.nargs == 0:
            continue  # --no_x stands only where the default is True
        ours = parser._option_string_actions[action.option_strings[0]]
        assert ours.help == action.help, action.dest
        assert ours.choices == action.choices, action.dest


@pytest.mark.parametrize(
    "content",
    [
        None,
        "x = 1",
        "class TrainArgument: pass",
        "import nothing_of_this_name",
        "def broken(:",
        "from dataclasses import dataclass\nfrom trl import SFTConfig\n"
        "@dataclass\nclass TrainArgument(SFTConfig): pass",
    ],
)
def test_recipes_that_are_none(tmp_path, content):
    file = tmp_path / "recipe.py"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError) as error:
        load_recipe(str(file))
    assert "recipe" in str(error.value)


def test_a_recipe_of_ones_own(parse, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\nfrom trl import SFTConfig\n@dataclass\nclass TrainArgument(SFTConfig):\n"
        "    task_types = ('sft',)\n    learning_rate: float = 7e-5\n"
    )
    assert parse("--train_args_path", str(file))[1].learning_rate == 7e-5


@pytest.mark.parametrize("flag", sorted(REPLACED_FLAGS))
def test_flags_that_would_do_nothing_are_refused(parse, flag):
    text = "\n".join(
        problems_of(parse, f"--{flag}", {"truncation_mode": "keep_end", "packing_strategy": "wrapped"}.get(flag, "1"))
    )
    assert f"--{flag} has no effect here; use --{''.join(REPLACED_FLAGS[flag])}" in text
