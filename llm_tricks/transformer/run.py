"""What each part of a Llama-shaped decoder is worth, on sums of two numbers below 100.

python -m llm_tricks.transformer.run --write           # 300 steps, two decoders, three seeds, under half a minute
python -m llm_tricks.transformer.run --long --write    # 1,000 steps, nine decoders, two learning rates, some minutes

One part is changed at a time. In the longer form the learning rate of each decoder is the one that does best on
481 held-back sums, on average over the seeds. The quick form stops while the decoders are still learning, and has the
paper's encoder and decoder copy sequences, 150 steps. Accuracy is that on 1,961 sums nobody trained or chose anything
on, and on 1,000 sequences nobody trained on.
"""

from statistics import mean

import torch

from llm_tricks.experiment import mean_and_spread, run_experiment
from llm_tricks.notebook import definitions

RATES = (2e-3, 5e-3)
DECODERS = {  # what is changed: the Shape's fields, and whether the lowest digit is written first
    "all parts": ({}, True),
    "no positions": ({"positions": "none"}, True),
    "no scaling by 1/√d": ({"scaled": False}, True),
    "no residual": ({"residual": False}, True),
    "no norm": ({"norm": False}, True),
    "sinusoidal positions": ({"positions": "sinusoidal"}, True),
    "4 key/value heads, not 2": ({"kv_heads": 4}, True),
    "1 key/value head, not 2": ({"kv_heads": 1}, True),
    "highest digit first": ({}, False),
}
QUICK = tuple(DECODERS)[:2]
COPY_STEPS = 150
LOWEST = 1e-4  # of the picture; on a logarithmic axis 0 has no place


def experiment(seeds: list[int], long: bool) -> dict:
    """Accuracy of each decoder, rate and seed."""
    nb = definitions("transformer")
    torch.set_num_threads(1)
    runs = []
    for seed in seeds:
        for name in DECODERS if long else QUICK:
            fields, lowest_first = DECODERS[name]
            train, choose, test = nb.split_sums(nb.sums(lowest_first))
            for rate in RATES if long else RATES[-1:]:
                torch.manual_seed(seed)
                model, losses = nb.train_adder(nb.Shape(**fields), train, steps=1000 if long else 300, lr=rate)
                run = {"decoder": name, "rate": rate, "seed": seed}
                run["weights"] = sum(w.numel() for w in model.parameters())
                run["chosen_by"] = nb.right_sums(model, choose).float().mean().item()
                run["test"] = nb.right_sums(model, test).float().mean().item()
                runs.append(run | {"losses": tens(losses)})
        print(f"seed {seed} done", flush=True)
    return {"runs": runs} if long else {"runs": runs, "copies": [copied(nb, seed) for seed in seeds]}


def copied(nb, seed: int) -> dict:
    """The paper's encoder and decoder, trained to copy."""
    torch.manual_seed(seed)
    model, losses = nb.train_translator("copy", COPY_STEPS)
    weights = sum(w.numel() for w in model.parameters())
    run = {"seed": seed, "weights": weights, "steps": COPY_STEPS, "test": nb.share_right(model, "copy")}
    return run | {"losses": tens(losses)}


def tens(losses: list[float]) -> list[float]:
    """Means of ten steps, to three digits: enough for the picture."""
    return [float(f"{mean(losses[i : i + 10]):.3g}") for i in range(0, len(losses), 10)]


def best(results: dict) -> list[dict]:
    """For each decoder, its runs at the learning rate that did best on the sums to choose by."""
    found = []
    for name in dict.fromkeys(run["decoder"] for run in results["runs"]):
        by_rate = {}
        for run in results["runs"]:
            if run["decoder"] == name:
                by_rate.setdefault(run["rate"], []).append(run)
        rate = max(by_rate, key=lambda rate: mean(run["chosen_by"] for run in by_rate[rate]))
        found.append({"decoder": name, "rate": rate, "weights": by_rate[rate][0]["weights"], "runs": by_rate[rate]})
    return found


def table(results: dict) -> str:
    """The README's table."""
    lines = ["| decoder | weights | learning rate | held-out sums right, % | worst seed, % |", "|---|---|---|---|---|"]
    for row in best(results):
        right = [run["test"] for run in row["runs"]]
        cells = (row["decoder"], f"{row['weights']:,}", f"{row['rate']:g}", mean_and_spread(right, scale=100))
        lines.append(f"| {' | '.join(cells)} | {min(right) * 100:.1f} |")
    if "copies" in results:
        copies, right = results["copies"], [run["test"] for run in results["copies"]]
        lines += ["", "| encoder and decoder | weights | steps | held-out sequences right, % | worst seed, % |"]
        lines.append("|---|---|---|---|---|")
        cells = ("copies", f"{copies[0]['weights']:,}", f"{copies[0]['steps']}", mean_and_spread(right, scale=100))
        lines.append(f"| {' | '.join(cells)} | {min(right) * 100:.1f} |")
    return "\n".join(lines)


def figure(results: dict):
    """The loss over the steps, mean over seeds with lowest and highest; the copying beside it."""
    import matplotlib.pyplot as plt

    curves = {"learning to add": {row["decoder"]: row["runs"] for row in best(results)}}
    if "copies" in results:
        curves["learning to copy"] = {"encoder and decoder": results["copies"]}
    figure, axes = plt.subplots(
        1, len(curves), figsize=(7 + 2 * (len(curves) - 1), 3.8), squeeze=False, layout="constrained"
    )
    for axis, (title, lines) in zip(axes[0], curves.items(), strict=True):
        for number, (name, runs) in enumerate(lines.items()):
            losses = torch.tensor([run["losses"] for run in runs]).clamp(min=LOWEST)
            steps = torch.arange(losses.shape[1]) * 10 + 5
            axis.plot(steps, losses.mean(dim=0), label=name, color=f"C{number}")
            axis.fill_between(steps, losses.amin(dim=0), losses.amax(dim=0), color=f"C{number}", alpha=0.1)
        axis.set(xlabel="step", title=title, yscale="log")
        axis.legend(fontsize=8, **({"bbox_to_anchor": (1.01, 1), "loc": "upper left"} if len(curves) == 1 else {}))
    axes[0, 0].set_ylabel(f"training loss ({LOWEST:g} where lower)")
    figure.suptitle("mean, lowest and highest of the seeds", fontsize=9)
    return figure


if __name__ == "__main__":
    run_experiment(__file__, __doc__, experiment, table, figure)
