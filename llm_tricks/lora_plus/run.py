"""LoRA+ and LoRA with the same care: a toy over widths, and digits that lie on their side.

python -m llm_tricks.lora_plus.run --write           # two widths, a few rates, under half a minute
python -m llm_tricks.lora_plus.run --long --write    # more of each, a quarter of an hour

A run has a ratio λ and a middle rate η: A learns at η/√λ and B at η·√λ. The middle rate of each column is chosen on
data that is not reported: in the toy on other seeds, by the training loss; on digits on 100 held-back pictures.
Losses are a share of the base's. Accuracy is that on the whole test set, 897 pictures.
"""

from itertools import product
from statistics import mean

import torch

from llm_tricks.experiment import mean_and_spread, run_experiment
from llm_tricks.notebook import definitions

TOY = {"ratios": (1, 16), "widths": (16, 256), "steps": (30,), "middles": [10 ** (-2.5 + i / 4) for i in range(10)]}
TOY_LONG = TOY | {"ratios": (1 / 16, 1, 4, 16, 64, 256), "widths": (16, 64, 256, 1024), "steps": (30, 300)}
DIGITS = {"ratios": (1, 16), "widths": (64, 256), "steps": (60,), "middles": (0.008, 0.016, 0.032, 0.064)}
DIGITS_LONG = {
    "ratios": TOY_LONG["ratios"],
    "widths": (64, 512),
    "steps": (60, 400),
    "middles": (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064),
}
OTHER_SEEDS = 100  # the toy's rates are chosen on the seeds from here on
ROWS = {
    "toy": {"training": "loss on the training points, %", "held_out": "loss on held-out points, %"},
    "digits": {"test": "test accuracy, %"},
}


def toy_runs(nb, seeds: list[int], ratios, widths, steps, middles) -> list[dict]:
    """The notebook's teacher and student, all pairs of rates at once, with the seeds and with as many others."""
    pairs, runs = list(product(ratios, middles)), []
    rates_a = torch.tensor([middle / ratio**0.5 for ratio, middle in pairs])
    rates_b = torch.tensor([middle * ratio**0.5 for ratio, middle in pairs])
    for width, step in product(widths, steps):
        if width > 256 and step > 100:
            continue  # minutes for each seed
        own = [nb.train_grid(width, rates_a, rates_b, step, seed) for seed in seeds]
        others = [nb.train_grid(width, rates_a, rates_b, step, seed + OTHER_SEEDS) for seed in seeds]
        # a run that got lost has no number for JSON, and counts as ten times the base's loss
        training, held_out, choose = (
            torch.stack(losses).nan_to_num(nan=10.0).clamp(max=10).T.tolist()
            for losses in ([run[0] for run in own], [run[1] for run in own], [run[0] for run in others])
        )
        for i, (ratio, middle) in enumerate(pairs):
            run = {"task": "toy", "width": width, "steps": step, "ratio": ratio, "middle": middle}
            run |= {"training": rounded(training[i]), "held_out": rounded(held_out[i])}
            runs.append(run | {"chosen_by": rounded([-loss for loss in choose[i]])})  # the more the better
    return runs


def digit_runs(nb, seeds: list[int], ratios, widths, steps, middles) -> list[dict]:
    """The notebook's network on turned digits, each pair of rates with each seed."""
    runs = {}
    for width, seed in product(widths, seeds):
        torch.manual_seed(seed)
        base = nb.network(width)
        groups = [{"params": list(base.parameters()), "lr": 1e-3}]
        nb.train(base, groups, *nb.digits(False, nb.BASE_PART), steps=200)
        for step, ratio, middle in product(steps, ratios, middles):
            torch.manual_seed(seed)
            model = nb.adapt(base)
            groups = nb.two_rates(model, middle / ratio**0.5, middle * ratio**0.5)
            nb.train(model, groups, *nb.digits(True, nb.TUNE_PART), steps=step)
            run = {"task": "digits", "width": width, "steps": step, "ratio": ratio, "middle": middle}
            run = runs.setdefault(tuple(run.values()), run | {"chosen_by": [], "test": []})
            for field, part in (("chosen_by", nb.CHOOSE_PART), ("test", nb.TEST_PART)):
                run[field] += rounded([nb.accuracy(model, *nb.digits(True, part))])
        print(f"digits, width {width}, seed {seed} done", flush=True)
    return list(runs.values())


def rounded(values: list[float]) -> list[float]:
    return [round(value, 6) for value in values]


def experiment(seeds: list[int], long: bool) -> dict:
    """Every run of both tasks, one entry for all seeds."""
    nb = definitions("lora_plus")
    torch.set_num_threads(1)
    toy = toy_runs(nb, seeds, **(TOY_LONG if long else TOY))
    return {"runs": toy + digit_runs(nb, seeds, **(DIGITS_LONG if long else DIGITS))}


def settings(results: dict) -> dict[tuple, dict[float, list[dict]]]:
    """(task, width, steps) → ratio → its runs, one for each middle rate."""
    found = {}
    for run in results["runs"]:
        found.setdefault((run["task"], run["width"], run["steps"]), {}).setdefault(run["ratio"], []).append(run)
    return found


def chosen(by_ratio: dict[float, list[dict]]) -> dict[float, dict]:
    """Each ratio's run with the middle rate that did best on the data to choose by."""
    return {ratio: max(runs, key=lambda run: mean(run["chosen_by"])) for ratio, runs in by_ratio.items()}


def at_low_rate(by_ratio: dict[float, list[dict]]) -> list[dict]:
    """Each ratio's run at an eighth of the middle rate chosen for equal rates; [] where that was not tried."""
    low = chosen(by_ratio)[1]["middle"] / 8
    return [run for runs in by_ratio.values() for run in runs if run["middle"] == low]


def named(ratio: float) -> str:
    return f"{ratio:g}" if ratio >= 1 else f"1/{1 / ratio:g}"


def table(results: dict) -> str:
    """The README's table."""
    found = settings(results)
    ratios = [f"λ = {named(ratio)}" for ratio in next(iter(found.values()))]
    lines = [f"| task | width | steps | | {' | '.join(ratios)} |"]
    lines.append("|---" * (4 + len(ratios)) + "|")
    for key, by_ratio in found.items():
        best = list(chosen(by_ratio).values())
        rows = [(name, field, best) for field, name in ROWS[key[0]].items()]
        if key[0] == "digits" and (low := at_low_rate(by_ratio)):
            rows.append(("the same at 1/8 of the η of λ = 1", "test", low))
        for name, field, runs in rows:
            cells = [mean_and_spread(run[field], 2 if key[0] == "toy" else 1, scale=100) for run in runs]
            lines.append(f"| {' | '.join(map(str, [*key, name, *cells]))} |")
        rates = [f"{run['middle']:.2g}" for run in best]
        lines.append(f"| {' | '.join(map(str, [*key, 'η chosen', *rates]))} |")
    return "\n".join(lines)


def figure(results: dict):
    """Loss and accuracy over the ratio, mean and range over the seeds; of the toy, the short training only."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    panels = {("toy", "training"): axes[0], ("toy", "held_out"): axes[1], ("digits", "test"): axes[2]}
    for (task, width, steps), by_ratio in settings(results).items():
        for field, name in ROWS[task].items():
            if (task, steps) == ("toy", 300):
                continue
            values = torch.tensor([run[field] for run in chosen(by_ratio).values()]) * 100
            middle = values.mean(1)
            spread = torch.stack([middle - values.amin(1), values.amax(1) - middle])
            axis = panels[task, field]
            axis.errorbar(list(by_ratio), middle, spread, label=f"n = {width}, {steps} steps", marker="o", capsize=3)
            axis.set(xscale="log", xlabel="λ = η_B / η_A", title=f"{task}: {name}")
            axis.set_xticks(list(by_ratio), map(named, by_ratio))
    for axis in axes:
        axis.xaxis.set_minor_locator(NullLocator())
        axis.legend(fontsize=7)
    for axis in axes[:2]:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    return figure


if __name__ == "__main__":
    run_experiment(__file__, __doc__, experiment, table, figure, seeds=5)
