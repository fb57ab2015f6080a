"""The peak of a step: against real steps, and extrapolated from shallow models."""

import pytest
from planning import EXPERTS, parse_run

from benchmarks.memory_plan import flags_of, peaks
from utils.memory import estimate
from utils.memory.activations import step_bytes
from utils.memory.fake import Batch
from utils.model.base_config import load_config
from utils.model.meta import meta_model

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


@pytest.mark.parametrize(("architecture", "mode", "again", "rows"), PEAKS)
def test_the_peak_of_a_step_is_the_planned_peak(architecture, mode, again, rows, tiny_models, tmp_path):
    more = ("--gradient_checkpointing", again, "--per_device_train_batch_size", rows)
    base = tiny_models(architecture, **EXPERTS.get(architecture, {}))
    flags = flags_of(mode, tmp_path, "--model_name_or_path", base, *more)
    measured, plan = peaks(flags, tmp_path)
    assert measured > 1e6
    assert plan == pytest.approx(measured, rel=0.15)


# of 8 tokens the head takes more than the gradients of four layers, and less than those of nine
@pytest.mark.parametrize(("mode", "tokens", "again"), [("lora", 128, False), ("full", 128, True), ("full", 8, True)])
def test_a_deep_model_is_extrapolated_from_shallow_ones(config_folder, monkeypatch, mode, tokens, again):
    folder = config_folder(num_hidden_layers=9, tie_word_embeddings=True)
    args, train_args = parse_run(folder, "--train_mode", mode)
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


@pytest.mark.parametrize("padding_free", ["true", "false"])
def test_one_row_needs_no_mask(config_folder, padding_free):
    """Activations grow with the tokens. transformers makes a mask, tokens × tokens, if it cannot read the positions."""
    folder = config_folder()
    row = ["--per_device_train_batch_size", "1", "--padding_free", padding_free, "--max_len"]
    short, long = (estimate(*parse_run(folder, *row, length), 1).activations for length in ("512", "1024"))
    assert long == pytest.approx(2 * short, rel=0.1)
