"""The estimate of a run: mixtures, preference pairs, a 7B model, and models that do not run without weights."""

import dataclasses
import math
from pathlib import Path

import pytest
import tiny
from loguru import logger
from planning import EXPERTS, parse_run

from utils.memory import Planner, Setting, estimate
from utils.memory.planner import batch_of


@pytest.mark.parametrize("architecture", EXPERTS)
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_all_experts_of_a_mixture_are_counted(architecture, mode, tiny_models):
    """Experts included, in the type that the mode loads them in; the sizes are those in the file's header."""
    from utils.storage.weights import read_header

    folder = tiny_models(architecture, **EXPERTS[architecture])
    args, train_args = parse_run(folder, "--train_mode", mode)
    args.precision = "bf16"
    header, _ = read_header(Path(folder) / "model.safetensors")
    entries = sum(math.prod(entry["shape"]) for entry in header.values())
    found = estimate(args, train_args, 1)
    if mode == "full":
        assert (found.parameters, found.gradients) == (4 * entries, 4 * entries)
    else:
        assert found.parameters - found.gradients == 2 * entries


def test_a_model_that_does_not_run_without_weights_has_no_estimate(config_folder, monkeypatch, capsys):
    from utils.doctor.resources import try_estimate
    from utils.runtime.errors import UserError

    def broken(*_, **__):
        raise RuntimeError("no kernel for this\nC++ stack")

    args, train_args = parse_run(config_folder("llama"))
    args.precision = "bf16"
    monkeypatch.setattr("utils.memory.planner.step_bytes", broken)
    with pytest.raises(UserError, match=r"does not run without weights \(RuntimeError: no kernel for this\)"):
        estimate(args, train_args, 1)
    assert try_estimate(args, train_args, 1) is None
    monkeypatch.setattr("utils.memory.planner.Planner.__init__", broken)
    assert try_estimate(args, train_args, 1) is None


def test_pairs_count_as_two_rows_and_full_dpo_holds_a_reference(config_folder):
    folder = config_folder()
    dpo = ["--train_args_path", "train_args/dpo/base.py", "--train_mode", "full", "--per_device_train_batch_size", "3"]
    args, train_args = parse_run(folder, *dpo)
    assert batch_of(args, train_args).rows == 6
    alone, _ = parse_run(folder, "--train_mode", "full")
    with_reference = estimate(args, train_args, 1).parameters
    assert with_reference == 2 * estimate(alone, parse_run(folder)[1], 1).parameters
    assert estimate(args, dataclasses.replace(train_args, precompute_ref_log_probs=True), 1).parameters == (
        with_reference // 2
    )


@pytest.fixture(scope="module")
def planner_of_7b(tmp_path_factory):
    from transformers import Qwen2Config

    from benchmarks.gpu_memory import SHAPES

    folder = tmp_path_factory.mktemp("7b")
    Qwen2Config(**SHAPES["qwen1.5-7b"]).save_pretrained(folder)
    flags = ["--max_len", "2048", "--per_device_train_batch_size", "1"]
    args, train_args = parse_run(folder, *flags)
    args.precision = "bf16"

    def make(gpus=1, **changes):
        return Planner(args, train_args, gpus, dataclasses.replace(batch_of(args, train_args), **changes))

    return make


def test_the_estimates_of_a_7b_model(planner_of_7b):
    """Elsewhere LoRA took 26 GB, with ZeRO-2 26, with ZeRO-3 16; rank, length and batch are not told there."""
    tiles, whole = planner_of_7b(), planner_of_7b(2, whole_logits=True)

    def gigabytes(planner, layout):
        return planner.estimate(Setting("lora", layout, True)).total / 1e9

    assert tiles.weights == 7_721_324_544
    in_tiles = gigabytes(tiles, "none")
    assert in_tiles < 18 and gigabytes(tiles, "zero3_offload") < 6
    ours = [gigabytes(whole, layout) for layout in ("none", "zero2", "zero3")]
    assert ours == pytest.approx([21.5, 23.5, 15.5], abs=1)
    # the heads of both: all logits in float32, four times over, against tiles
    logits = 2048 * 151936 * 4 / 1e9
    assert gigabytes(planner_of_7b(whole_logits=True), "none") - in_tiles > 3 * logits


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
    assert batch_of(*parse_run(tmp_path, *flags)).end_to_end is end_to_end


def test_what_no_adapter_reaches_is_named_once_for_all_settings(tmp_path):
    tiny.config_for("qwen3_moe", 512, **EXPERTS["qwen3_moe"]).save_pretrained(tmp_path)
    lines = []
    sink = logger.add(lambda line: lines.append(str(line)), format="{message}")
    planner = Planner(*parse_run(tmp_path, "--max_len", "16", "--per_device_train_batch_size", "1"), 1)
    for mode in ("lora", "dora", "qlora"):
        for layout in ("none", "zero2"):
            planner.estimate(Setting(mode, layout, False))
    logger.remove(sink)
    assert len([line for line in lines if "model.layers.N.mlp.experts holds" in line]) == 1
