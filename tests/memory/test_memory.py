"""utils/memory against reckoning by hand, against bitsandbytes, and against what real steps hold."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import tiny
from conftest import ROOT

from benchmarks.memory_plan import LAYOUTS, MODES, PARTS, STATES, flags_of, held, peaks, planned
from utils.args import parse_args
from utils.memory import Planner, Setting, estimate
from utils.memory.activations import step_bytes
from utils.memory.fake import Batch
from utils.memory.layout import layout_of, optimizer_states, quantised_bytes
from utils.memory.planner import batch_of
from utils.memory.states import hold
from utils.model.base_config import load_config
from utils.model.meta import meta_model


def read(folder, *flags):
    run = ["--model_name_or_path", str(folder), "--output_dir", str(ROOT / "output" / "never"), *flags]
    return parse_args(run, needs_weights=False)


@pytest.fixture
def config_folder(tmp_path):
    """A folder with a config.json alone."""

    def make(architecture="qwen2", vocabulary=512, **changes):
        tiny.config_for(architecture, vocabulary, **changes).save_pretrained(tmp_path / architecture)
        return tmp_path / architecture

    return make


# ---------------------------------------------------------------------- by hand
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
def test_states_by_hand(config_folder, flags, layout, gpus, wanted):
    args, train_args = read(config_folder("llama", tie_word_embeddings=False), *flags)
    args.precision, where = "bf16", layout_of(layout, gpus)
    found = hold(args, train_args, meta_model(args, train_args, where.laid_out), where, 2)
    assert (found.parameters, found.gradients, found.optimizer) == wanted


@pytest.mark.parametrize(("gpus", "copies"), [(1, 0), (2, 1), (8, 1)])
def test_data_parallel_training_holds_a_second_copy_of_the_gradients(config_folder, gpus, copies):
    """DDP's buckets, of all that is trained, however many take part; nothing else is split or added."""
    args, train_args = read(config_folder("llama", tie_word_embeddings=False), "--train_mode", "full")
    args.precision = "bf16"
    found = hold(args, train_args, meta_model(args, train_args, False), layout_of("none", gpus), 2)
    assert (found.buffers, found.parameters, found.gradients) == (copies * 4 * WEIGHTS, 4 * WEIGHTS, 4 * WEIGHTS)


@pytest.mark.parametrize("shape", [(256, 256), (704, 256), (128, 64), (100, 30)])
def test_a_quantised_weight_has_the_bytes_that_bitsandbytes_gives_it(shape):
    import torch
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(torch.randn(shape).bfloat16(), quant_type="nf4", compress_statistics=True)
    found = quantised_bytes(shape[0] * shape[1])
    parts = (packed, state.absmax, state.offset, state.state2.absmax, state.code, state.state2.code)
    sizes = [part.untyped_storage().nbytes() for part in parts]
    assert (found.packed, found.scales, found.codes) == (sizes[0], sum(sizes[1:4]), sum(sizes[4:]))


def test_an_optimizers_states_are_those_of_a_real_step():
    import torch

    _, train_args = read(ROOT / "data" / "tiny_model", "--optim", "adafactor")
    shapes = [(40, 30), (7,)]
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    from transformers import Trainer

    kind, options = Trainer.get_optimizer_cls_and_kwargs(train_args)
    optimizer = kind(weights, **options)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    kept = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value)
    )
    assert kept >= (40 + 30 + 7) * 4
    assert optimizer_states(train_args, [torch.empty(shape, device="meta") for shape in shapes]) == kept


# ---------------------------------------------------------------------- a step's peak
PEAKS = [
    ("qwen2", "full", "false", "2"),
    ("llama", "lora", "true", "1"),
    ("gemma", "dora", "false", "1"),
    ("phi3", "qlora", "false", "2"),
    ("mistral", "full", "true", "1"),
    ("mixtral", "full", "false", "2"),
    ("qwen2_moe", "qlora", "false", "2"),
    ("qwen3_moe", "lora", "true", "1"),
]  # not gpt_oss: the rows here are packed, which it is refused
EXPERTS = {
    **dict.fromkeys(("mixtral", "gpt_oss"), {"num_local_experts": 4, "num_experts_per_tok": 2}),
    **dict.fromkeys(
        ("qwen2_moe", "qwen3_moe"),
        dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, shared_expert_intermediate_size=64),
    ),
}


@pytest.mark.parametrize(("architecture", "mode", "again", "rows"), PEAKS)
def test_the_peak_of_a_step_is_the_planned_one(architecture, mode, again, rows, tiny_models, tmp_path):
    more = ("--gradient_checkpointing", again, "--per_device_train_batch_size", rows)
    base = tiny_models(architecture, **EXPERTS.get(architecture, {}))
    flags = flags_of(mode, tmp_path, "--model_name_or_path", base, *more)
    measured, plan = peaks(flags, tmp_path)
    assert measured > 1e6
    assert plan == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("architecture", EXPERTS)
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_mixture_s_weights_are_all_counted(architecture, mode, tiny_models):
    """Experts included, in the type that the mode loads them in; the sizes are those in the file's header."""
    from utils.storage.weights import read_header

    folder = tiny_models(architecture, **EXPERTS[architecture])
    args, train_args = read(folder, "--train_mode", mode)
    args.precision = "bf16"
    header, _ = read_header(Path(folder) / "model.safetensors")
    entries = sum(math.prod(entry["shape"]) for entry in header.values())
    found = estimate(args, train_args, 1)
    if mode == "full":
        assert (found.parameters, found.gradients) == (4 * entries, 4 * entries)
    else:
        assert found.parameters - found.gradients == 2 * entries


def test_a_model_that_cannot_be_run_without_weights_ends_nothing(config_folder, monkeypatch, capsys):
    from utils.doctor.resources import try_estimate
    from utils.runtime.errors import UserError

    def broken(*_, **__):
        raise RuntimeError("no kernel for this\nC++ stack")

    args, train_args = read(config_folder("llama"))
    args.precision = "bf16"
    monkeypatch.setattr("utils.memory.planner.step_bytes", broken)
    with pytest.raises(UserError, match=r"does not run without weights \(RuntimeError: no kernel for this\)"):
        estimate(args, train_args, 1)
    assert try_estimate(args, train_args, 1) is None
    monkeypatch.setattr("utils.memory.planner.Planner.__init__", broken)
    assert try_estimate(args, train_args, 1) is None


# of 8 tokens the head takes more than the gradients of four layers, and less than those of nine
@pytest.mark.parametrize(("mode", "tokens", "again"), [("lora", 128, False), ("full", 128, True), ("full", 8, True)])
def test_a_deep_model_is_reckoned_from_shallow_ones(config_folder, monkeypatch, mode, tokens, again):
    folder = config_folder(num_hidden_layers=9, tie_word_embeddings=True)
    args, train_args = read(folder, "--train_mode", mode)
    args.precision, config = "bf16", load_config(args.model_name_or_path)

    def steps():
        build = lambda config: meta_model(args, train_args, False, config)  # noqa: E731
        return step_bytes(args, train_args, build, config, Batch(1, tokens), False, again)

    shallow = steps()
    monkeypatch.setattr("utils.memory.activations.LESS_SHALLOW", 9)
    whole = steps()
    assert (shallow.saved, shallow.peak) == (whole.saved, whole.peak)
    worst = [max(found.early, found.late, found.peak) for found in (shallow, whole)]
    assert worst[0] == pytest.approx(worst[1], rel=0.01)


def test_pairs_count_as_two_rows_and_full_dpo_holds_a_reference(config_folder):
    folder = config_folder()
    dpo = ["--train_args_path", "train_args/dpo/base.py", "--train_mode", "full", "--per_device_train_batch_size", "3"]
    args, train_args = read(folder, *dpo)
    assert batch_of(args, train_args).rows == 6
    alone, _ = read(folder, "--train_mode", "full")
    with_reference = estimate(args, train_args, 1).parameters
    assert with_reference == 2 * estimate(alone, read(folder)[1], 1).parameters
    assert estimate(args, dataclasses.replace(train_args, precompute_ref_log_probs=True), 1).parameters == (
        with_reference // 2
    )


# ---------------------------------------------------------------------- a 7B
@pytest.fixture(scope="module")
def planner_of_7b(tmp_path_factory):
    from transformers import Qwen2Config

    from benchmarks.gpu_memory import SHAPES

    folder = tmp_path_factory.mktemp("7b")
    Qwen2Config(**SHAPES["qwen1.5-7b"]).save_pretrained(folder)
    flags = ["--max_len", "2048", "--per_device_train_batch_size", "1"]
    args, train_args = read(folder, *flags)
    args.precision = "bf16"

    def make(gpus=1, **changes):
        return Planner(args, train_args, gpus, dataclasses.replace(batch_of(args, train_args), **changes))

    return make


def test_the_shape_of_the_known_figures_of_a_7b(planner_of_7b):
    """Elsewhere LoRA took 26 GB, with ZeRO-2 26, with ZeRO-3 16; rank, length and batch are not told there."""
    tiles, whole = planner_of_7b(), planner_of_7b(2, whole_logits=True)

    def gigabytes(planner, layout):
        return planner.estimate(Setting("lora", layout, True)).total / 1e9

    assert tiles.weights == 7_721_324_544
    assert gigabytes(tiles, "none") < 18 and gigabytes(tiles, "zero3_offload") < 6
    ours = [gigabytes(whole, layout) for layout in ("none", "zero2", "zero3")]
    assert ours == pytest.approx([21.5, 23.5, 15.5], abs=1)
    # the heads of both: all logits in float32, four times over, against tiles
    logits = 2048 * 151936 * 4 / 1e9
    assert gigabytes(planner_of_7b(whole_logits=True), "none") - gigabytes(tiles, "none") > 3 * logits


# ---------------------------------------------------------------------- two real processes
@pytest.mark.slow
@pytest.mark.parametrize(("layout", "mode"), [("none", "qlora"), ("zero2", "full"), ("zero3", "lora")])
def test_two_processes_hold_what_is_planned_to_the_byte(layout, mode, tmp_path):
    flags = flags_of(mode, tmp_path)
    assert held(layout, flags, tmp_path) == planned(layout, flags)


def test_the_noted_measurements_agree():
    """benchmarks/memory_plan.json: every layout and kind of training to the byte, every peak within 15 %."""
    noted = json.loads((ROOT / "benchmarks" / "memory_plan.json").read_text(encoding="utf-8"))
    assert len(noted["states"]) == len(LAYOUTS) * len(STATES) and len(noted["peaks"]) == 4 * len(MODES)
    for line in noted["states"]:
        assert set(line["held"]) == set(PARTS) and line["held"] == line["planned"], line
    assert all(0.85 <= line["ratio"] <= 1.15 for line in noted["peaks"])
