"""The fields of CommonArgs."""

import dataclasses

from transformers import HfArgumentParser

from utils.args import CommonArgs


def test_every_common_field_has_help_and_is_a_flag():
    parser = HfArgumentParser(CommonArgs)
    for field in dataclasses.fields(CommonArgs):
        assert len(field.metadata["help"]) > 15, field.name
        assert f"--{field.name}" in parser._option_string_actions


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
