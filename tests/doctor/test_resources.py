"""Memory and disk: the size of a checkpoint, and what a process and the machine need."""

import json
from types import SimpleNamespace

import pytest
import tiny

from utils.args import parse_args
from utils.doctor import resources
from utils.model import meta
from utils.train.plan import steps_of


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_checkpoints_have_the_estimated_size(train, tiny_models, rows_file, tmp_path, mode):
    run = train("--train_mode", mode, "--save_strategy", "epoch", "--train_special_tokens", "off")
    args, train_args = parse_args(
        ["--model_name_or_path", tiny_models(), "--train_data_path", rows_file, "--train_mode", mode,
         "--output_dir", str(tmp_path / "other")]
    )  # fmt: skip
    one, finished = resources.checkpoint_bytes(args, train_args, meta.model_size(args))
    (checkpoint, *_) = sorted(run.glob("checkpoint-*"))
    state = json.loads((run / "trainer_state.json").read_text())
    train_args.per_device_train_batch_size, train_args.num_train_epochs = 4, 2
    assert state["max_steps"] == steps_of(train_args, len(tiny.ROWS), 1)
    names = ("adapter_model.safetensors", "model.safetensors", "optimizer.pt")
    written = {path.name: path.stat().st_size for path in checkpoint.iterdir() if path.name in names}
    assert sum(written.values()) == pytest.approx(one, rel=0.15)  # names and figures of each tensor beside the numbers
    assert written["model.safetensors" if mode == "full" else "adapter_model.safetensors"] == pytest.approx(
        finished, rel=0.15
    )


@pytest.mark.parametrize(
    ("total", "host", "processes", "wanted"),
    [
        (5, 0, 1, []),
        (11, 0, 1, ["error about 11.0 GB are needed, and the machine has 10.0 GB"]),
        (9.5, 0, 1, ["warning about 9.5 GB are needed, and the machine has 10.0 GB"]),
        (4, 0, 2, []),
        (6, 0, 2, ["error about 6.0 GB are needed, and each of 2 processes has 5.0 GB"]),
        (1, 6, 2, ["error about 12.0 GB are needed, and the machine has 10.0 GB"]),
    ],
)
def test_memory_per_process_and_of_the_machine(monkeypatch, total, host, processes, wanted):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=10 * 10**9))
    estimate = SimpleNamespace(total=int(total * 1e9), host=int(host * 1e9))
    monkeypatch.setattr(resources, "try_estimate", lambda *_: estimate)
    found = resources.memory_findings(None, None, processes)
    assert [f"{finding.severity} {finding.message}" for finding in found] == wanted


@pytest.mark.parametrize(
    ("optim", "only_model", "sizes"),
    [("adamw_torch", False, (12, 4)), ("adamw_torch", True, (4, 4)), ("sgd", False, (4, 4)),
     ("adamw_8bit", False, (6, 4))],
)  # fmt: skip
def test_bytes_per_weight_of_a_checkpoint(optim, only_model, sizes):
    """In float32, beside AdamW's two numbers: float32 each, or one byte each."""
    args = SimpleNamespace(train_mode="full", precision="bf16")
    train_args = SimpleNamespace(deepspeed_plugin=None, optim=optim, save_only_model=only_model)
    shape = meta.ModelSize(1000, 1000, None, False)
    assert resources.checkpoint_bytes(args, train_args, shape) == tuple(1000 * size for size in sizes)


def test_bytes_per_weight_under_deepspeed():
    """As measured with DeepSpeed 0.19.8, ZeRO-2 in bf16: 16 bytes for each weight."""
    args = SimpleNamespace(train_mode="full", precision="bf16")
    shape = meta.ModelSize(1_000_000, 1_000_000, None, False)
    plain = SimpleNamespace(deepspeed_plugin=None, optim="adamw_torch_fused", save_only_model=False)
    deepspeed = SimpleNamespace(deepspeed_plugin=object(), optim="adamw_torch_fused", save_only_model=False)
    assert resources.checkpoint_bytes(args, deepspeed, shape) == (16_000_000, 2_000_000)
    assert resources.checkpoint_bytes(args, plain, shape) == (12_000_000, 4_000_000)
