"""Runs main_train.py and writes down what each of its processes holds, as JSON beside `$REPORT`.

Not a command by itself: `benchmarks.memory_plan` starts it, by `python` or by DeepSpeed's launcher. Bytes are summed
over the storages that tensors really have, each counted once; the peak of a step is that of PyTorch's CPU allocator,
as its profiler records every allocation, kernels' own included.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
STEP = 2  # the first one has no optimizer states yet


def _storages(tensors) -> dict[int, int]:
    return {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for tensor in tensors
        if tensor is not None and tensor.device.type != "meta"
    }


def _parameters(model):
    for weight in model.parameters():
        yield weight.data
        yield getattr(weight, "ds_tensor", None)
        state = getattr(weight, "quant_state", None)
        if state is not None:
            yield from (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)


def _gradients(model, zero):
    yield from (weight.grad for weight in model.parameters())
    for kept in (getattr(zero, "averaged_gradients", None) or {}).values():
        yield from kept or []
    yield getattr(zero, "grad_partitions_flat_buffer", None)
    yield from (master.grad for master in _masters(zero))


def _masters(zero):
    """The float32 copies that DeepSpeed's optimizers step on."""
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat"):
        yield from getattr(zero, name, None) or []


def _states(trainer, zero):
    import torch

    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    yield from _masters(zero)
    for group in optimizer.param_groups:
        yield from group["params"]
    for state in optimizer.state.values():
        yield from (value for value in state.values() if torch.is_tensor(value))


def sums(trainer) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer states in this process."""
    zero = trainer.model_wrapped.optimizer if trainer.is_deepspeed_enabled else None
    parameters = _storages(_parameters(trainer.model))
    gradients = _storages(_gradients(trainer.model, zero))
    states = _storages(_states(trainer, zero))
    return {
        "parameters": sum(parameters.values()),
        "gradients": sum(size for key, size in gradients.items() if key not in parameters),
        "optimizer": sum(size for key, size in states.items() if key not in parameters and key not in gradients),
    }


def step_peak(step) -> tuple[int, object]:
    """The most bytes that lived at once in `step`, those from before it left out; and its result."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = step()
    with tempfile.NamedTemporaryFile(suffix=".json") as trace:
        profile.export_chrome_trace(trace.name)
        events = json.loads(Path(trace.name).read_text(encoding="utf-8"))["traceEvents"]
    moves = [event["args"] for event in events if event.get("name") == "[memory]"]
    before = moves[0]["Total Allocated"] - moves[0]["Bytes"]
    return max(move["Total Allocated"] for move in moves) - before, result


def watch(report: str, peak: bool):
    """Has every trainer that is built here write its report; returns a function that undoes it.

    Args:
        report: a file's name, to which the process's number is added.
        peak: whether to profile the second step.
    """
    import utils.tasks.dpo_trainer as dpo
    import utils.tasks.sft as sft
    from utils.tasks.trainer import make_trainer

    found: dict = {}

    def watched(*args, **kwargs):
        trainer = make_trainer(*args, **kwargs)
        _watch_trainer(trainer, found, f"{report}.{os.environ.get('RANK', '0')}", peak)
        return trainer

    sft.make_trainer = dpo.make_trainer = watched

    def undo():
        sft.make_trainer = dpo.make_trainer = make_trainer

    return undo


def _watch_trainer(trainer, found: dict, file: str, peak: bool) -> None:
    from transformers import TrainerCallback

    class Notes(TrainerCallback):
        def on_pre_optimizer_step(self, *_, **__):
            if not trainer.is_deepspeed_enabled:
                found["gradients"] = sums(trainer)["gradients"]

        def on_step_end(self, *_, **__):
            found.update({name: size for name, size in sums(trainer).items() if name != "gradients"})

        def on_train_end(self, *_, **__):
            Path(file).write_text(json.dumps(found), encoding="utf-8")

    trainer.add_callback(Notes())
    if peak:
        _profile_second_step(trainer, found)
    if trainer.is_deepspeed_enabled:
        _watch_engine(trainer, found)


def _watch_engine(trainer, found: dict) -> None:
    """Gradients as the backward pass ends (ZeRO-0 and -1), or as the step begins (ZeRO-2 and -3)."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    name = "step" if trainer.args.deepspeed_plugin.zero_stage >= 2 else "allreduce_gradients"
    then = getattr(DeepSpeedEngine, name)

    def noted(self, *args, **kwargs):
        found["gradients"] = sums(trainer)["gradients"]
        return then(self, *args, **kwargs)

    setattr(DeepSpeedEngine, name, noted)


def _profile_second_step(trainer, found: dict) -> None:
    kind, count = type(trainer), [0]
    step = kind.training_step

    def profiled(self, model, inputs, *rest):
        count[0] += 1
        if count[0] != STEP:
            return step(self, model, inputs, *rest)
        found["trained"] = int((inputs["labels"] != -100).sum()) if "labels" in inputs else None
        found["peak"], result = step_peak(lambda: step(self, model, inputs, *rest))
        return result

    kind.training_step = profiled


if __name__ == "__main__":
    watch(os.environ["REPORT"], peak=False)
    import main_train
    from utils.runtime.command import run_command

    sys.argv = [word for word in sys.argv if not word.startswith("--local_rank")]
    run_command(main_train.main)
