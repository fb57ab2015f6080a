"""Where the time of a training step goes: torch's profiler over ten steps of a run.

    python -m benchmarks.profile_steps --train_data_path alpaca_en_52k.jsonl    # any flags of main_train.py

Prints the groups below as shares of the time that torch's own operators took; it writes nothing but the run, which
ends after these steps.
"""

import sys

from main_train import main as train
from utils.runtime.command import run_command

SKIPPED, PROFILED = 3, 10  # steps; the first ones make buffers and kernels
GROUPS = {  # group → its operators, in place or not
    "matrix products": ("mm", "addmm", "bmm", "_int_mm"),
    "element by element": ("mul", "add", "silu", "silu_backward", "div", "sub", "pow", "exp"),
    "copies and types": ("copy", "_to_copy", "cat", "fill"),
}
HOLDING = {"attention": ("attention",), "optimizer": ("Optimizer", "_foreach", "_fused")}  # group → parts of names


def group_of(operator: str) -> str:
    """`group_of("aten::addmm")` → `"matrix products"`; what belongs to none is `"the rest"`."""
    name = operator.removeprefix("aten::").removesuffix("_")
    fits = [group for group, names in GROUPS.items() if name in names]
    fits += [group for group, parts in HOLDING.items() if any(part in operator for part in parts)]
    return next(iter(fits), "the rest")


def shares(times: dict[str, float]) -> list[tuple[str, float]]:
    """Time of each operator → share of each group, the largest first."""
    found = dict.fromkeys([*GROUPS, *HOLDING, "the rest"], 0.0)
    for operator, time in times.items():
        found[group_of(operator)] += time
    whole = sum(found.values()) or 1.0
    return sorted(((name, time / whole) for name, time in found.items()), key=lambda pair: -pair[1])


def main() -> None:
    import torch

    import utils.train.trainer
    from utils.patches.lazy_imports import import_peft

    import_peft()
    from transformers import TrainerCallback

    profiler = torch.profiler.profile()

    class Watch(TrainerCallback):
        running = False

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == SKIPPED:
                profiler.start()
                self.running = True
            if state.global_step == SKIPPED + PROFILED:
                self.running = False
                profiler.stop()

    watch = Watch()
    prepare = utils.train.trainer.prepare_trainer

    def prepare_and_watch(trainer, *given):
        prepare(trainer, *given)
        trainer.add_callback(watch)

    utils.train.trainer.prepare_trainer = prepare_and_watch
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
    try:
        train([*sys.argv[1:], "--max_steps", str(SKIPPED + PROFILED)])
    finally:
        if watch.running:  # a profiler that still runs when Python ends takes it down
            profiler.stop()
    times = {event.key: event.self_cpu_time_total + event.self_device_time_total for event in profiler.key_averages()}
    print(f"{sum(times.values()) / PROFILED / 1000:.0f} ms a step in torch's operators")
    for name, share in shares(times):
        print(f"{share:6.1%}  {name}")


if __name__ == "__main__":
    run_command(main)
