"""Where each value comes from: every kind of source, and that parsing says the same with them as without."""

import dataclasses
import json
import re
import sys

import pytest
from conftest import ROOT

from utils.args import CommonArgs, parse_args, parse_with_sources
from utils.config.deepspeed import CONFIGS
from utils.config.provenance import Sources, default_source, same, unannotated
from utils.config.recipe import load_recipe
from utils.run.record import effective_args

RECIPES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "train_args").glob("*/*.py"))
DPO = ["--train_args_path", "train_args/dpo/base.py"]


@pytest.fixture
def sources_of(tiny_models, rows_file, tmp_path):
    """The sources of a command line, with a model, rows and a folder that exist."""

    def run(*flags):
        paths = ["--model_name_or_path", tiny_models(), "--train_data_path", rows_file]
        return parse_with_sources([*paths, "--output_dir", str(tmp_path / "run"), *flags])[2]

    return run


def line_at(where: str) -> str:
    file, _, number = where.rpartition(":")
    return (ROOT / file).read_text(encoding="utf-8").splitlines()[int(number) - 1]


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(CommonArgs)])
def test_a_default_of_ours_is_on_the_line_that_is_named(name):
    source = default_source(CommonArgs, name)
    assert source.kind == "default" and source.where.startswith("utils/args.py:")
    assert re.match(rf"    {name}: ", line_at(source.where))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipes_default_is_on_its_line_and_an_inherited_one_in_its_class(recipe):
    recipe_type = load_recipe(recipe)
    written = set(re.findall(r"^    (\w+): (?!ClassVar)", (ROOT / recipe).read_text(encoding="utf-8"), re.M))
    for field in dataclasses.fields(recipe_type):
        source = default_source(recipe_type, field.name)
        assert (source.kind == "recipe") == (field.name in written), field.name
        if source.kind == "recipe":
            assert source.where.startswith(recipe) and re.match(rf"    {field.name}: ", line_at(source.where))
        else:
            owner = source.where.split("'s ")[-1].split("' ")[-1]
            parents = {parent.__name__: parent for parent in recipe_type.__mro__}
            assert field.name in vars(parents[owner])["__annotations__"]


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("adam_beta1", "transformers' TrainingArguments"),
        ("bf16", "TRL's _BaseConfig"),
        ("loss_type", "TRL's SFTConfig"),
    ],
)
def test_the_class_of_an_inherited_default(name, where):
    assert default_source(load_recipe(RECIPES[-1]), name).where == where


@pytest.mark.parametrize(
    ("flags", "name", "where"),
    [
        (["--lora_rank=4"], "lora_rank", "--lora_rank=4"),
        (["--lora-rank", "4"], "lora_rank", "--lora-rank 4"),
        (["--lora_rank", "16"], "lora_rank", "--lora_rank 16"),  # the default, yet given
        (["--use_dora"], "use_dora", "--use_dora"),
        (["--no_padding_free"], "padding_free", "--no_padding_free"),
        (["--learning_rate", "1e-4", "--learning_rate", "2e-4"], "learning_rate", "--learning_rate 2e-4"),
        (["--deepspeed", "none"], "deepspeed", "--deepspeed none"),
        (["--report_to", "none"], "report_to", "--report_to none"),
        (["--lr_scheduler_kwargs", '{"num_cycles": 1}'], "lr_scheduler_kwargs",
         """--lr_scheduler_kwargs '{"num_cycles": 1}'"""),
    ],
)  # fmt: skip
def test_flags_as_they_were_typed(sources_of, flags, name, where):
    source = sources_of(*flags)[name]
    assert (source.kind, source.where, source.before) == ("flag", where, None)


@pytest.mark.parametrize(
    ("flags", "name", "said", "instead_of"),
    [
        ([], "task_type", "the first task of the recipe train_args/sft/base.py", "utils/args.py"),
        ([], "eval_strategy", "neither --eval_data_path nor --val_size", "train_args/sft/base.py"),
        ([], "precision", "--precision auto", "utils/args.py"),
        (["--fp16", "false", "--bf16", "false"], "precision", "--bf16 false", "utils/args.py"),
        (["--max_len", "64"], "max_prompt_length", "half of --max_len 64", "utils/args.py"),
        (["--val_size", "2", "--early_stopping_patience", "3"], "load_best_model_at_end",
         "--early_stopping_patience 3 needs it", "transformers'"),
        (["--val_size", "2", "--load_best_model_at_end", "true", "--save_strategy", "epoch"], "eval_strategy",
         "--load_best_model_at_end true needs it", "train_args/sft/base.py"),
        (["--val_size", "2", "--load_best_model_at_end", "true", "--eval_steps", "3"], "save_steps",
         "--load_best_model_at_end true needs it", "train_args/sft/base.py"),
        (["--val_size", "2", "--load_best_model_at_end", "true"], "greater_is_better",
         "--metric_for_best_model eval_loss", "transformers'"),
        (["--gradient_checkpointing", "true"], "activation_checkpointing", "--gradient_checkpointing", "transformers'"),
    ],
)  # fmt: skip
def test_derived_values_say_what_from_and_instead_of_what(sources_of, flags, name, said, instead_of):
    source = sources_of(*flags)[name]
    assert source.kind == "derived" and said in source.where
    assert source.before.where.startswith(instead_of)


def test_what_follows_from_the_machine(sources_of):
    found = sources_of()
    assert found["use_cpu"].where == "this machine has no GPU" and found["use_cpu"].internal
    found = sources_of("--precision", "fp32")
    assert found["precision"].where == "--precision fp32" and found["bf16"].where == "--precision fp32"


def test_samples_and_folder_follow_from_the_task():
    found = parse_with_sources([])[2]
    assert found["train_data_path"].where == "the sample for the task sft"
    assert found["output_dir"].where == "the task sft and the time"


def test_the_file_of_config(sources_of, train, tmp_path):
    flags = ["--max_steps", "1", "--lora_rank", "4", "--learning_rate", "1e-4", "--card_samples", "0"]
    run = train(*flags, output="first")
    found = parse_with_sources(["--config", str(run), "--learning_rate", "3e-4"])[2]
    assert (found["lora_rank"].kind, found["lora_rank"].where) == ("config", f"{run}: common.lora_rank")
    assert found["max_steps"].where == f"{run}: trainer.max_steps"
    assert found["learning_rate"].where == "--learning_rate 3e-4"
    assert found["lora_alpha"].kind == "default"  # the file says the same as the default
    plain = tmp_path / "flags.json"
    plain.write_text(json.dumps({"--lora_rank": 2, "seed": 7}))
    found = sources_of("--config", str(plain))
    assert (found["lora_rank"].where, found["seed"].where) == (f"{plain}: lora_rank", f"{plain}: seed")


def test_what_an_adapter_brings(train, tmp_path, tiny_models, rows_file):
    run = train("--max_steps", "1", "--lora_rank", "4", "--template_name", "yi", "--card_samples", "0")
    flags = ["--adapter_name_or_path", str(run), "--train_data_path", rows_file, "--output_dir", str(tmp_path / "next")]
    args, _, found = parse_with_sources(flags)
    assert args.lora_rank == 4 and found["lora_rank"].where == f"adapter_config.json of --adapter_name_or_path {run}"
    assert args.model_name_or_path == tiny_models() and "adapter_config.json" in found["model_name_or_path"].where
    assert args.template_name == "yi" and "run that this one starts from" in found["template_name"].where


def test_deepspeeds_launcher_without_a_name(monkeypatch):
    monkeypatch.setenv("CROSS_SIZE", "1")
    found = Sources(load_recipe(RECIPES[-1]), CommonArgs)
    found._values = {"deepspeed": None}
    found.note_step("deepspeed", {"deepspeed": str(CONFIGS / "ds_config_zero2.json")})
    assert found["deepspeed"].kind == "launcher" and "launcher" in found["deepspeed"].where


def test_recipes_of_ones_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import sys\nfrom dataclasses import dataclass\nfrom typing import ClassVar\nfrom trl import SFTConfig\n\n\n"
        "@dataclass\nclass Base(SFTConfig):\n    learning_rate: float = 1e-5\n    seed: int = 1\n\n\n"
        "@dataclass\nclass TrainArgument(Base):\n    task_types: ClassVar = ('sft',)\n    seed: int = 2\n"
        "    warmup_steps = 7\n"
    )
    recipe = load_recipe(str(file))
    places = {name: default_source(recipe, name) for name in ("learning_rate", "seed", "warmup_steps")}
    assert [(one.kind, one.where) for one in places.values()] == [
        ("recipe", f"{file}:9"), ("recipe", f"{file}:16"), ("library", "transformers' TrainingArguments"),
    ]  # fmt: skip
    # a dataclass takes no notice of an attribute without a type
    assert unannotated(recipe) == {"warmup_steps": f"{file}:17"}
    assert recipe(output_dir="x", use_cpu=True).warmup_steps != 7


def test_a_recipe_whose_file_cannot_be_read_again_stops_no_run(tmp_path, sources_of):
    file = tmp_path / "odd.py"
    text = "from trl import SFTConfig\nfrom dataclasses import dataclass\n@dataclass\nclass TrainArgument(SFTConfig):\n"
    file.write_text(text + "    task_types = ('sft',)\n    seed: int = 3\n")
    recipe = load_recipe(str(file))
    del sys.modules[recipe.__module__]
    assert default_source(recipe, "seed").where == f"{recipe.__module__}.TrainArgument"


@pytest.mark.parametrize("flags", [[], DPO])
def test_every_effective_value_has_a_source(flags):
    args, train_args, found = parse_with_sources(flags)
    settings = effective_args(args, train_args)
    assert set(settings["trainer"]) | set(settings["common"]) <= set(found)


def test_parsing_says_the_same_without_sources(tmp_path):
    flags = ["--output_dir", str(tmp_path / "run"), "--early_stopping_patience", "2", "--max_len", "64"]
    plain, (args, train_args, _) = parse_args(flags), parse_with_sources(flags)
    assert (plain[0], plain[1].to_dict()) == (args, train_args.to_dict())


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("steps", load_recipe(RECIPES[-1])(output_dir="x", use_cpu=True).eval_strategy, True),
        ("tensorboard", ["tensorboard"], True),
        ("none", [], True),
        (None, "", True),
        (20, 20.0, True),
        ('{"a": 1}', {"a": 1}, True),
        ("zero2", str(CONFIGS / "ds_config_zero2.json"), True),
        ("data/tiny_model", str(ROOT / "data/tiny_model"), True),
        ("~/model", "/root/model", True),
        (None, False, False),
        (0, None, False),
        ("auto", "bf16", False),
        ("model", "/x/other_model", False),
    ],
)
def test_two_forms_of_a_value(one, other, alike):
    assert same(one, other) is alike
