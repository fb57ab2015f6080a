"""What padding, grouping and packing compute for real lengths, and whether the training notices.

python -m llm_tricks.packing.run --write           # counts on the lengths of four data sets, under half a minute
python -m llm_tricks.packing.run --long --write    # trains the notebook's decoder in each way, 10 to 20 minutes

A seed is an order of the rows, in the training also the start of the weights. Nothing here is timed: what is counted
are tokens and pairs. The training is on texts of the project's own, every tenth of which is held back and scored alone.
"""

import json
from pathlib import Path
from statistics import mean

import numpy as np
import torch

from llm_tricks.experiment import mean_and_spread, run_experiment
from llm_tricks.notebook import definitions

ROOT = Path(__file__).resolve().parents[2]
BATCH, WIDTH, EPOCHS = 8, 896, 5
# name → how the rows of a step are chosen, and what keeps them apart: without a mask at most the positions
TRAININGS = {
    "padded": ("chance", "block mask"),
    "end to end": ("chance", "block mask"),
    "packed": ("packed", "block mask"),
    "packed, decreasing": ("packed, decreasing", "block mask"),
    "packed, no mask": ("packed", "restart"),
    "packed, no mask, positions run on": ("packed", "run on"),
}


def count(nb, lengths, seed: int) -> dict:
    """What each way computes for rows of these lengths in one random order."""
    order = nb.shuffled(lengths, seed)
    # the bin in which each row ends
    ends = (np.cumsum(lengths[order]) - 1) // nb.ROOM
    joined = np.split(order, np.flatnonzero(np.diff(ends)) + 1)
    *ways, packed = nb.ways_of(lengths, BATCH, seed)
    ways.append(("packed, next fit", nb.pack(lengths, nb.ROOM, "next", order), nb.ROOM))
    ways.append(("packed, best fit", nb.pack(lengths, nb.ROOM, "best", order), nb.ROOM))
    ways += [("packed, best fit decreasing", *packed[1:]), ("joined and cut", joined, nb.ROOM)]
    found = {name: nb.counts(lengths, steps, shape) for name, steps, shape in ways}
    for name, steps, shape in ways:
        one, needed = found[name], nb.needed_pairs(lengths)
        one |= {"rows": len(lengths) / len(steps), "between": float(nb.between_steps(lengths, steps))}
        one["cut"] = nb.cut_rows(lengths[order]) / len(lengths) if name == "joined and cut" else 0.0
        one["work"] = nb.work(one, WIDTH)
        if shape != "padded":  # one row a step: a kernel for variable length leaves out what no example needs
            one["least"] = nb.work(one, WIDTH, needed)
    return {way: {key: round(value, 5) for key, value in one.items()} for way, one in found.items()}


def texts() -> tuple[list, list]:
    """The project's pretraining texts as token ids, every tenth apart."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(ROOT / "data" / "tiny_model"))
    lines = (ROOT / "data" / "pretrain_data.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [tokenizer(json.loads(line)["text"])["input_ids"] + [tokenizer.eos_token_id] for line in lines]
    return [row for n, row in enumerate(rows) if n % 10], rows[::10]


def train(nb, name: str, train_rows, held_rows, seed: int) -> dict:
    """Trains a decoder in one way: its losses, and that on texts held back, each alone."""
    way, apart = TRAININGS[name]
    lengths = np.array([len(row) for row in train_rows])
    room = BATCH * round(lengths.mean())  # as many tokens a step as in the others
    steps = [step for epoch in range(EPOCHS) for step in nb.schedule(lengths, way, BATCH, room, seed, epoch)]

    def form(rows, labels):
        batch = (nb.padded if name == "padded" else nb.end_to_end)(rows, labels)
        if apart == "run on":
            batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
        return batch

    torch.manual_seed(seed)
    model = nb.Decoder(3584)
    mask = nb.block_mask if apart == "block mask" else nb.causal_mask
    losses = nb.train(model, train_rows, train_rows, steps, form, mask)
    with torch.no_grad():
        alone = nb.alone(held_rows, held_rows)
        held = sum(nb.token_losses(model, batch).sum() for batch in alone) / nb.trained_tokens(alone)
    padding = nb.counts(lengths, steps[: len(steps) // EPOCHS], "padded")["padding"] if name == "padded" else 0.0
    return {"way": name, "seed": seed, "steps": len(steps), "padding": padding, "held": held.item(), "losses": losses}


def experiment(seeds: list[int], long: bool) -> dict:
    """Counts of each set, way and seed; or with `long` the training in each way."""
    nb = definitions("packing")
    torch.set_num_threads(1)
    if not long:
        sets = nb.read_lengths(str(Path(__file__).with_name("lengths.json")))
        counted = {name: [count(nb, lengths, seed) for seed in seeds] for name, lengths in sets.items()}
        return {"batch": BATCH, "room": nb.ROOM, "width": WIDTH, "sets": counted}
    train_rows, held_rows = texts()
    runs = []
    for seed in seeds:
        runs += [train(nb, name, train_rows, held_rows, seed) for name in TRAININGS]
        print(f"seed {seed} done", flush=True)
    by = {(run["way"], run["seed"]): run["losses"] for run in runs}
    for run in runs:
        # the same rows in the same steps: how far the loss is from that of the padded training
        if TRAININGS[run["way"]][0] == "chance":
            run["apart"] = max(abs(a - b) for a, b in zip(run["losses"], by["padded", run["seed"]], strict=True))
        run["losses"] = [round(mean(run["losses"][i : i + 20]), 4) for i in range(0, run["steps"], 20)]
    return {"epochs": EPOCHS, "texts": [len(train_rows), len(held_rows)], "runs": runs}


def table(results: dict) -> str:
    """The README's table."""
    return training_table(results["runs"]) if "runs" in results else counts_table(results["sets"])


def counts_table(sets: dict) -> str:
    heads = ("set", "way", "steps", "rows a step", "padding, %", "largest step", "pairs a token", "work")
    heads += ("work, variable length", "η², %", "rows cut, %")
    columns = (("steps", 0, 1), ("rows", 1, 1), ("padding", 1, 100), ("largest", 0, 1), ("pairs", 0, 1), ("work", 2, 1))
    columns += (("least", 2, 1), ("between", 1, 100), ("cut", 1, 100))
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, seeds in sets.items():
        for way in seeds[0]:
            cells = [name, way]
            for key, digits, scale in columns:
                values = [one[way][key] for one in seeds if key in one[way]]
                # what no order changes has no spread
                same = f"{mean(values) * scale:,.{digits}f}" if len(set(values)) == 1 else ""
                cells.append(same or (mean_and_spread(values, digits, scale) if values else ""))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def training_table(runs: list[dict]) -> str:
    heads = ("way", "steps", "padding, %", "held-out loss", "minus the padded one's", "training loss, furthest apart")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    padded = [run["held"] for run in runs if run["way"] == "padded"]
    for way in TRAININGS:
        found = [run for run in runs if run["way"] == way]
        held = [run["held"] for run in found]
        cells = [way, f"{mean(run['steps'] for run in found):,.0f}"]
        cells += [mean_and_spread([run["padding"] for run in found], 1, 100), mean_and_spread(held, 3)]
        # + 0.0: no −0.000
        away = [round(one - other, 5) + 0.0 for one, other in zip(held, padded, strict=True)]
        cells.append(mean_and_spread(away, 3) if way != "padded" else "")
        cells.append(f"{max(run['apart'] for run in found):.0e}" if way == "end to end" else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(results: dict):
    """The work of each way on each set, or the losses of the trainings."""
    import matplotlib.pyplot as plt

    if "runs" in results:
        figure, axis = plt.subplots(figsize=(6.5, 3.4))
        for number, way in enumerate(TRAININGS):
            losses = [run["losses"] for run in results["runs"] if run["way"] == way]
            points = [mean(values) for values in zip(*losses, strict=False)]
            style = {"linewidth": 4, "alpha": 0.4} if way == "padded" else {}
            axis.plot([20 * n + 10 for n in range(len(points))], points, label=way, color=f"C{number}", **style)
        axis.set(xlabel="step", ylabel="training loss", title="mean of the seeds; each way measures its own rows")
        axis.legend(fontsize=8)
        return figure
    figure, axes = plt.subplots(1, 2, figsize=(10, 3), sharey=True)
    ways = list(next(iter(results["sets"].values()))[0])
    for number, (name, seeds) in enumerate(results["sets"].items()):
        places = [row + 0.2 * number - 0.3 for row in range(len(ways))]
        for axis, key, scale in ((axes[0], "padding", 100), (axes[1], "work", 1)):
            axis.barh(places, [mean(one[way][key] for one in seeds) * scale for way in ways], height=0.2, label=name)
    axes[0].set(yticks=range(len(ways)), yticklabels=ways, xlabel="padding, % of the tokens computed")
    axes[1].set(xlabel=f"work for each real token, dense mask, width {results['width']}")
    axes[1].axvline(1, color="grey", linestyle=":")
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    run_experiment(__file__, __doc__, experiment, table, figure)
