"""Flags, recipes and the checks that need no model."""

import dataclasses

import pytest
from conftest import ROOT
from transformers import HfArgumentParser

import utils.config.defaults
from utils.args import CommonArgs, parse_args
from utils.config.recipe import REPLACED_FLAGS, load_recipe
from utils.runtime.errors import UserError


@pytest.fixture
def parse(tiny_models, rows_file, tmp_path):
    """parse_args with a model, rows and a folder that exist."""

    def run(*flags):
        return parse_args(
            [
                "--model_name_or_path",
                tiny_models(),
                "--train_data_path",
                rows_file,
                "--output_dir",
                str(tmp_path / "run"),
                *flags,
            ]
        )

    return run


def problems_of(parse, *flags):
    with pytest.raises(UserError) as error:
        parse(*flags)
    return [str(problem) for problem in error.value.problems]


def test_every_common_field_has_help_and_is_a_flag():
    parser = HfArgumentParser(CommonArgs)
    for field in dataclasses.fields(CommonArgs):
        assert len(field.metadata["help"]) > 15, field.name
        assert f"--{field.name}" in parser._option_string_actions


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


def test_the_names_other_programs_rely_on():
    names = {field.name for field in dataclasses.fields(CommonArgs)}
    assert {
        "train_args_path",
        "model_name_or_path",
        "train_data_path",
        "eval_data_path",
        "task_type",
        "train_mode",
        "use_dora",
        "template_name",
        "max_len",
        "max_prompt_length",
        "lora_rank",
        "lora_alpha",
        "lora_dropout",
    } <= names


def test_defaults_and_flags(parse):
    args, train_args = parse("--lora_rank=4", "--learning_rate", "3e-4", "--use_dora")
    assert (args.lora_rank, args.use_dora, args.task_type) == (4, True, "sft")
    assert train_args.learning_rate == 3e-4
    assert train_args.weight_decay == 0.0  # the recipe's own default


def test_local_rank_of_the_deepspeed_launcher_is_accepted(parse):
    _, train_args = parse("--local_rank=0")
    assert train_args.local_rank == 0


@pytest.mark.parametrize("also", [[], ["--save_strategy", "sometimes"]])
def test_all_problems_come_at_once(parse, also):
    problems = problems_of(
        parse,
        "--lerning_rate",
        "3",
        "--lora_rank",
        "x",
        "--train_mode",
        "lroa",
        "--template_name",
        "qwem",
        "--max_len",
        "1",
        "--lora_dropout",
        "1.5",
        *also,
    )
    text = "\n".join(problems)
    assert len(problems) == 6 + len(also) // 2
    for value, remedy in [
        ("--lerning_rate", "'--learning_rate'"),
        ("'x'", "number"),
        ("'lroa'", "'lora'"),
        ("'qwem'", "'qwen'"),
        ("--max_len 1", "at least 2"),
        ("--lora_dropout 1.5", "below 1"),
    ]:
        assert value in text and remedy in text


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--train_mode", "full", "--use_dora", "true"], "--use_dora True needs an adapter"),
        (["--train_mode", "full", "--init_lora_weights", "pissa"], "--init_lora_weights pissa needs an adapter"),
        (["--train_mode", "full", "--loraplus_lr_ratio", "16"], "--loraplus_lr_ratio 16.0 needs an adapter"),
        (["--train_mode", "qlora", "--init_lora_weights", "pissa"], "quantised"),
        (["--task_type", "pretrain"], "does not fit the recipe"),
        (["--max_length", "100"], "use --max_len"),
        (["--precision", "fp32", "--bf16", "true"], "contradicts"),
        (["--precision", "fp16"], "CUDA"),
        (["--train_args_path", "train_args/sft/bse.py"], "train_args/sft/base.py"),
        (["--eval_strategy", "steps"], "--eval_data_path or --val_size"),
        (["--eval_on_start", "true"], "--eval_on_start true"),
        (["--val_size", "2.5"], "a share below 1 or a number of rows"),
        (["--resume_from_checkpoint", "nowhere"], "'nowhere' is not a checkpoint"),
        (["--resume_from_checkpoint", "true"], "holds no complete checkpoint"),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size 0"),
        (["--learning_rate", "-1"], "--learning_rate -1.0"),
        (["--num_train_epochs", "0"], "trains nothing"),
        (["--num_train_epochs", "1e30"], "never ends; give a number above 0 and at most 1,000,000"),
        (
            ["--group_by_length", "true"],
            "--group_by_length is not a flag. It is --train_sampling_strategy group_by_length",
        ),
        (["--report_to", "tensorbord"], "Did you mean 'tensorboard'"),
        (["--report_to", "tensorboard", "tensorbord"], "--report_to 'tensorbord' is not installed. Did you mean"),
        (["--report_to", "none", "tensorboard"], "--report_to none tensorboard: 'none' cannot be combined with others"),
        (["--packing", "true", "--padding_free", "false"], "--packing true needs --padding_free true"),
        (["--lora_alpha", "inf"], "--lora_alpha inf is not allowed; give a number above 0"),
        (["--lora_alpha", "nan"], "--lora_alpha nan is not allowed"),
        (["--warmup_steps"], "--warmup_steps"),
        (["stray"], "stray"),
    ],
)
def test_what_is_refused_and_how(parse, flags, said):
    assert said in "\n".join(problems_of(parse, *flags))


def test_several_trackers(parse, monkeypatch):
    from transformers import integrations

    monkeypatch.setattr(integrations, "get_available_reporting_integrations", lambda: ["tensorboard", "wandb"])
    assert parse("--report_to", "wandb", "tensorboard", "--seed", "7")[1].report_to == ["wandb", "tensorboard"]
    for word, wanted in (("none", []), ("tensorboard", ["tensorboard"])):
        assert parse("--report_to", word)[1].report_to == wanted


@pytest.mark.parametrize("flag", sorted(REPLACED_FLAGS))
def test_flags_that_would_do_nothing_are_refused(parse, flag):
    text = "\n".join(
        problems_of(parse, f"--{flag}", {"truncation_mode": "keep_end", "packing_strategy": "wrapped"}.get(flag, "1"))
    )
    assert f"--{flag} has no effect here; use --{''.join(REPLACED_FLAGS[flag])}" in text


def test_bf16_asked_for_where_there_is_none(parse, monkeypatch):
    monkeypatch.setattr(utils.config.defaults, "device_has_bf16", lambda: False)
    for flags in (["--bf16", "true"], ["--precision", "bf16"]):
        assert "bf16 was requested" in problems_of(parse, *flags)[0]
    args, train_args = parse()
    assert (args.precision, train_args.bf16, train_args.fp16) == ("fp32", False, False)


def test_precision_sets_the_trainers_arithmetic(parse, monkeypatch):
    monkeypatch.setattr(utils.config.defaults, "device_has_bf16", lambda: True)
    assert parse()[1].bf16
    assert not parse("--precision", "fp32")[1].bf16
    assert parse("--bf16", "false")[0].precision == "fp32"


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


def test_a_finished_run_is_not_trained_over(parse, tmp_path):
    (tmp_path / "run").mkdir()
    parse()
    (tmp_path / "run" / utils.storage.run_folder.RECORD_FILE).write_text("{}")
    assert "--overwrite_output_dir true" in problems_of(parse)[0]
    parse("--overwrite_output_dir", "true")


def test_a_folder_that_cannot_be_written(parse, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file" in problems_of(parse, "--output_dir", str(tmp_path / "file"))[0]
    assert "cannot be written" in problems_of(parse, "--output_dir", "/proc/run")[0]
    assert "--cache_dir '/proc/cache' cannot be written" in problems_of(parse, "--cache_dir", "/proc/cache")[0]
    assert "cannot be written" in problems_of(parse, "--output_dir", str(tmp_path / "file" / "run"))[0]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: None, "does not exist"),
        (lambda folder: folder.mkdir(), "no config.json"),
        (lambda folder: folder.write_text(""), "is a file"),
        (lambda folder: (folder.mkdir(), (folder / "config.json").write_text("{}")), "no *.safetensors"),
        (lambda folder: (folder.mkdir(), (folder / "adapter_config.json").write_text("{}")), "an adapter"),
    ],
)
def test_model_folders_that_are_none(parse, tmp_path, make, said):
    make(tmp_path / "model")
    assert said in problems_of(parse, "--model_name_or_path", str(tmp_path / "model"))[0]


def test_a_model_folder_that_cannot_be_read(parse):
    said = problems_of(parse, "--model_name_or_path", "/" + "x" * 300)[0]
    assert "cannot be read: File name too long" in said


def test_a_misspelt_folder_shows_its_neighbour(parse):
    text = problems_of(parse, "--model_name_or_path", "data/tiny_modle")[0]
    assert "Did you mean 'data/tiny_model'" in text


def test_a_hub_name_is_not_taken_for_a_path(parse):
    assert parse("--model_name_or_path", "Qwen/Qwen1.5-7B")[0].model_name_or_path == "Qwen/Qwen1.5-7B"
