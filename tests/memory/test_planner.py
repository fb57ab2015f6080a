"""What a plan reckons with: the layout of rows that the run will choose, and one line for what is not trained."""

import pytest
import tiny
from conftest import ROOT
from loguru import logger

from utils.args import parse_args
from utils.memory import Planner, Setting
from utils.memory.planner import batch_of

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def read(folder, *flags):
    run = ["--model_name_or_path", str(folder), "--output_dir", str(ROOT / "output" / "never"), *flags]
    return parse_args(run, needs_weights=False)


@pytest.mark.parametrize(
    ("architecture", "flags", "end_to_end"),
    [
        ("qwen2", [], True),
        ("qwen2", ["--attn_implementation", "eager"], False),
        ("qwen2", ["--padding_free", "false"], False),
        ("mamba", [], False),  # a recurrent state goes from row to row
    ],
)
def test_rows_are_planned_in_the_layout_of_the_run(architecture, flags, end_to_end, tmp_path):
    tiny.config_for(architecture, 512).save_pretrained(tmp_path)  # a config.json alone: no tokenizer
    assert batch_of(*read(tmp_path, *flags)).end_to_end is end_to_end


def test_what_no_adapter_reaches_is_named_once_for_all_settings(tmp_path):
    tiny.config_for("qwen3_moe", 512, **EXPERTS).save_pretrained(tmp_path)
    lines = []
    sink = logger.add(lambda line: lines.append(str(line)), format="{message}")
    planner = Planner(*read(tmp_path, "--max_len", "16", "--per_device_train_batch_size", "1"), 1)
    for mode in ("lora", "dora", "qlora"):
        for layout in ("none", "zero2"):
            planner.estimate(Setting(mode, layout, False))
    logger.remove(sink)
    assert len([line for line in lines if "model.layers.N.mlp.experts holds" in line]) == 1
