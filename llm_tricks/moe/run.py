"""A mixture of experts with and without what balances it, beside dense models, on text of the project's own.

python -m llm_tricks.moe.run --write           # 75 steps at one learning rate, three seeds, under half a minute
python -m llm_tricks.moe.run --long --write    # 800 steps at two or three rates and more variants, some minutes

Every tenth document is held back. Of this text the first half chooses each variant's learning rate, on average over the
seeds; the second half measures the loss and the load, with nothing dropped. Drops are those of the last fifth of
training.
"""

from pathlib import Path
from statistics import mean

import torch

from llm_tricks.experiment import mean_and_spread, run_experiment
from llm_tricks.notebook import definitions

EXPERTS, ALPHA, C_Z = 8, 0.01, 0.001
RATES, DENSE_RATES, QUICK_RATES = (0.01, 0.02), (0.01, 0.02, 0.03), (0.02,)  # dense models bear larger ones
QUICK = ("dense, same active size", "nothing added", "balance", "balance, z", "capacity 1", "capacity 1, balance")
# name → options of the model (times: the hidden width, in HIDDEN) and factors of the losses
VARIANTS = {
    "dense, same active size": ({"experts": 1, "k": 1, "times": 2}, {}),
    "dense, same size in all": ({"experts": 1, "k": 1, "times": EXPERTS}, {}),
    "nothing added": ({}, {}),
    "balance": ({}, {"balance": ALPHA}),
    "balance, z": ({}, {"balance": ALPHA, "z": C_Z}),
    "noise": ({"noisy": True}, {}),
    "noise, balance": ({"noisy": True}, {"balance": ALPHA}),
    "capacity 1": ({"factor": 1.0}, {}),
    "capacity 1, balance": ({"factor": 1.0}, {"balance": ALPHA}),
    "capacity 1.25": ({"factor": 1.25}, {}),
    "capacity 1.25, balance": ({"factor": 1.25}, {"balance": ALPHA}),
}


def one_run(nb, texts, name: str, rate: float, seed: int, steps: int) -> dict:
    """Trains one variant, and measures it."""
    train_text, held_text, alphabet = texts
    choose, test = held_text.chunk(2)
    options, losses = VARIANTS[name]
    options = {"experts": EXPERTS, "k": 2, "times": 1} | options
    torch.manual_seed(seed)
    model = nb.LanguageModel(len(alphabet), hidden=options.pop("times") * nb.HIDDEN, **options)
    history = nb.train(model, train_text, steps, lr=rate, seed=seed, **losses)
    last = history[-steps // 5 :]
    loss, routings = nb.evaluate(model, test)
    run = {"chosen_by": nb.evaluate(model, choose)[0], "loss": loss}
    if routings:
        loads = [nb.load_of(routing.chosen, options["experts"]) for routing in routings]
        run["cv"] = mean(nb.spread(load) for load in loads)
        run["busiest"] = mean(load.max().item() * options["experts"] for load in loads)
        run["log_sum_exp"] = mean(nb.z_loss(routing).item() ** 0.5 for routing in routings)
        run |= {key.replace(" ", "_"): mean(step[key] for step in last) for key in nb.dropped([])}
    run = {key: round(value, 4) for key, value in run.items()}
    return {"variant": name, "rate": rate, "seed": seed, "active": nb.active_weights(model)} | run


def rates_of(name: str) -> tuple[float, ...]:
    """The learning rates to try, in the long form."""
    return DENSE_RATES if name.startswith("dense") else RATES


def experiment(seeds: list[int], long: bool) -> dict:
    """Every variant at every rate with every seed."""
    nb = definitions("moe")
    torch.set_num_threads(1)
    texts = nb.corpus(Path(__file__).resolve().parents[2])
    steps, runs = 800 if long else 75, []
    for seed in seeds:
        for name in VARIANTS if long else QUICK:
            for rate in rates_of(name) if long else QUICK_RATES:
                runs.append(one_run(nb, texts, name, rate, seed, steps))
        print(f"seed {seed} done", flush=True)
    return {"steps": steps, "runs": runs}


def best(results: dict) -> dict[str, list[dict]]:
    """For each variant its runs, one a seed, at the learning rate that did best on the text to choose by."""
    found = {}
    for name in dict.fromkeys(run["variant"] for run in results["runs"]):
        by_rate: dict[float, list[dict]] = {}
        for run in results["runs"]:
            if run["variant"] == name:
                by_rate.setdefault(run["rate"], []).append(run)
        found[name] = min(by_rate.values(), key=lambda runs: mean(run["chosen_by"] for run in runs))
    return found


def table(results: dict) -> str:
    """The README's table."""
    heads = ("variant", "learning rate", "loss", "minus the dense one's", "CV of the load", "busiest, × even share")
    heads += ("choices dropped, %", "tokens dropped, %", "log Σ exp")
    columns = (("cv", 2, 1), ("busiest", 1, 1), ("choices_dropped", 1, 100), ("tokens_dropped", 1, 100))
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    variants = best(results)
    dense = variants["dense, same active size"]
    for name, runs in variants.items():
        cells = [name, f"{runs[0]['rate']:g}", mean_and_spread([run["loss"] for run in runs], digits=3)]
        differences = [run["loss"] - other["loss"] for run, other in zip(runs, dense, strict=True)]
        cells.append(mean_and_spread(differences, digits=3) if runs is not dense else "")
        for key, digits, scale in (*columns, ("log_sum_exp", 2, 1)):
            cells.append(mean_and_spread([run[key] for run in runs], digits, scale) if key in runs[0] else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(results: dict):
    """Loss, spread of the load and drops of each variant, a dot a seed."""
    import matplotlib.pyplot as plt

    variants = best(results)
    figure, axes = plt.subplots(1, 3, figsize=(9, 1 + 0.24 * len(variants)), sharey=True)
    for axis, (key, scale, label) in zip(
        axes,
        (
            ("loss", 1, "loss, nats a character"),
            ("cv", 1, "CV of the load"),
            ("choices_dropped", 100, "choices dropped, %"),
        ),
        strict=True,
    ):
        for row, runs in enumerate(variants.values()):
            values = [run[key] * scale for run in runs if key in run]
            axis.plot(values, [row] * len(values), "o", color="tab:blue", alpha=0.6, markersize=5)
        axis.set(xlabel=label, xlim=(None if key == "loss" else -0.05 * axis.get_xlim()[1], None))
        axis.locator_params(axis="x", nbins=4)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set(yticks=range(len(variants)), yticklabels=variants)
    axes[0].invert_yaxis()
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    run_experiment(__file__, __doc__, experiment, table, figure)
