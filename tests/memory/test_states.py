"""Weights, gradients and optimizer states: counted by hand, and held by real processes."""

import json

import pytest
from conftest import ROOT
from planning import parse_run

from benchmarks.memory_plan import LAYOUTS, MODES, PARTS, STATES, flags_of, held, planned
from utils.memory.layout import layout_of
from utils.memory.states import model_states
from utils.model.meta import meta_model

# a Llama of vocabulary 512, width 64, 2 layers, 4 heads and 2 of keys of 16, MLP of 64, head and embedding apart
LAYER = 64 * 64 + 2 * (64 * 32) + 64 * 64 + 3 * 64 * 64 + 2 * 64
WEIGHTS = 2 * 512 * 64 + 2 * LAYER + 64
ADAPTERS = 2 * 16 * ((64 + 64) + 2 * (64 + 32) + (64 + 64) + 3 * (64 + 64))  # rank 16
STEPS = 4  # bytes of the step number that AdamW keeps of each tensor


@pytest.mark.parametrize(
    ("flags", "layout", "gpus", "wanted"),
    [
        # full: float32 weights, gradients, two moments of 21 tensors
        (["--train_mode", "full"], "none", 1, (4 * WEIGHTS, 4 * WEIGHTS, 8 * WEIGHTS + 21 * STEPS)),
        # LoRA: the base in bf16, adapters in float32; 7 layers × 2 × 2 tensors
        ([], "none", 1, (2 * WEIGHTS + 4 * ADAPTERS, 4 * ADAPTERS, 8 * ADAPTERS + 28 * STEPS)),
        # ZeRO-1: all in bf16, half of 12 bytes a weight on each of two; decayed and not decayed weights apart
        (["--train_mode", "full"], "zero1", 2, (2 * WEIGHTS, 2 * WEIGHTS, 6 * WEIGHTS + 2 * STEPS)),
        # ZeRO-3: half of everything; each of these weights has fewer than 10 × 64 numbers or all of them are split
        (["--train_mode", "full"], "zero3", 2, (WEIGHTS + 2 * 5 * 64, WEIGHTS, 6 * WEIGHTS + 2 * STEPS)),
    ],
)
def test_states_equal_a_count_by_hand(config_folder, flags, layout, gpus, wanted):
    args, train_args = parse_run(config_folder("llama", tie_word_embeddings=False), *flags)
    args.precision, where = "bf16", layout_of(layout, gpus)
    found = model_states(args, train_args, meta_model(args, train_args, where.laid_out), where, 2)
    assert (found.parameters, found.gradients, found.optimizer) == wanted


@pytest.mark.parametrize(("gpus", "copies"), [(1, 0), (2, 1), (8, 1)])
def test_ddp_holds_a_second_copy_of_the_gradients(config_folder, gpus, copies):
    """DDP's buckets, of all that is trained, however many take part; nothing else is split or added."""
    args, train_args = parse_run(config_folder("llama", tie_word_embeddings=False), "--train_mode", "full")
    args.precision = "bf16"
    found = model_states(args, train_args, meta_model(args, train_args, False), layout_of("none", gpus), 2)
    assert (found.buffers, found.parameters, found.gradients) == (copies * 4 * WEIGHTS, 4 * WEIGHTS, 4 * WEIGHTS)


@pytest.mark.slow
@pytest.mark.usefixtures("fast_processes")
@pytest.mark.parametrize(("layout", "mode"), [("none", "qlora"), ("zero2", "full"), ("zero3", "lora")])
def test_two_processes_hold_the_planned_bytes(layout, mode, tmp_path):
    flags = flags_of(mode, tmp_path)
    assert held(layout, flags, tmp_path) == planned(layout, flags)


def test_the_recorded_measurements_equal_the_plan():
    """benchmarks/memory_plan.json: every layout and kind of training to the byte, every peak within 15 %."""
    noted = json.loads((ROOT / "benchmarks" / "memory_plan.json").read_text(encoding="utf-8"))
    assert len(noted["states"]) == len(LAYOUTS) * len(STATES) and len(noted["peaks"]) == 4 * len(MODES)
    for line in noted["states"]:
        assert set(line["held"]) == set(PARTS) and line["held"] == line["planned"], line
    assert all(0.85 <= line["ratio"] <= 1.15 for line in noted["peaks"])
