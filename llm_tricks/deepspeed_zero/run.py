"""What each ZeRO stage holds, sends and moves, measured on real processes, and whether the weights are the same.

python -m llm_tricks.deepspeed_zero.run                   # two ranks, three seeds, under half a minute
python -m llm_tricks.deepspeed_zero.run --long --write    # two and four ranks; keeps results, figure and table

Bytes are those of rank 0 in a bf16 step, divided by the number of weights. The weights are compared after five AdamW
steps with one process that trained on whole batches, in float32 and in float64.
"""

import torch

from llm_tricks.experiment import run_experiment
from llm_tricks.notebook import definitions

PLACES, KINDS = ("card", "cpu"), ("weights", "gradients", "optimizer")


def train(nb, name: str, seed: int) -> dict:
    """What one rank does: a bf16 step on the ring, which counts bytes, and five each with gloo's collectives."""
    found = {dtype: nb.run(name, dtype, 5, seed, nb.Collectives) for dtype in (torch.float32, torch.float64)}
    return found | {torch.bfloat16: nb.run(name, torch.bfloat16, 1, seed, nb.Ring)}


def experiment(seeds: list[int], long: bool) -> dict:
    """What each stage, number of ranks and seed came to."""
    nb = definitions("deepspeed_zero")
    runs = []
    for seed in seeds:
        targets = {dtype: nb.launch(1, nb.reference, dtype, 5, seed)[0] for dtype in (torch.float32, torch.float64)}
        for ranks in (2, 4) if long else (2,):
            for name in nb.STAGES:
                reports = nb.launch(ranks, train, nb, name, seed)[0]
                report, psi = reports[torch.bfloat16], len(targets[torch.float32])
                run = {"stage": name, "ranks": ranks, "seed": seed, "formula": nb.formula(name, ranks)}
                for moment in ("after backward", "held at rest", "bus"):
                    run[moment] = {key: size / psi for key, size in report[moment].items()}
                run |= {"peak": report["peak"] / psi, "sent": report["sent"] / psi}
                for dtype, target in targets.items():
                    away = (reports[dtype]["weights"] - target).abs()
                    run[str(dtype)] = {"max": away.max().item(), "mean": away.mean().item()}
                    run[str(dtype)]["above 1e-6"] = (away > 1e-6).sum().item()
                runs.append(run)
        print(f"seed {seed} done", flush=True)
    return {"weights": psi, "runs": runs}


def groups(results: dict) -> list[list[dict]]:
    """The runs of all seeds, by ranks and stage."""
    kinds = dict.fromkeys((run["ranks"], run["stage"]) for run in sorted(results["runs"], key=lambda run: run["ranks"]))
    return [[run for run in results["runs"] if (run["ranks"], run["stage"]) == kind] for kind in kinds]


def total(bytes_of: dict, place: str) -> float:
    """Bytes a weight at a place."""
    return sum(size for key, size in bytes_of.items() if key.startswith(place))


def table(results: dict) -> str:
    """The README's table; bytes are the same for every seed, differences are the largest."""
    head = ["ranks", "stage", "card: formula", "measured", "peak", "at rest", "CPU: formula", "measured", "sent", "bus"]
    head += ["float32: largest difference", "float64"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for runs in groups(results):
        run = runs[0]
        cells = [run["ranks"], run["stage"]]
        measured = [total(run["after backward"], place) for place in PLACES]
        cells += [f"{total(run['formula'], 'card'):.2f}", f"{measured[0]:.2f}", f"{run['peak']:.2f}"]
        cells += [f"{run['held at rest']['card']:.2f}", f"{total(run['formula'], 'cpu'):.2f}", f"{measured[1]:.2f}"]
        cells += [f"{run['sent']:.2f}", f"{sum(run['bus'].values()):.2f}"]
        cells += [f"{max(run[dtype]['max'] for run in runs):.0e}" for dtype in ("torch.float32", "torch.float64")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def figure(results: dict):
    """Measured bytes a weight of each stage, stacked by kind, with the formula and the peak."""
    import matplotlib.pyplot as plt

    firsts = [runs[0] for runs in groups(results)]
    figure, axis = plt.subplots(figsize=(8.5, 3.8))
    for place, hatch, shift in (("card", None, -0.2), ("cpu", "///", 0.2)):
        low = [0.0] * len(firsts)
        for kind, color in zip(KINDS, ("tab:blue", "tab:orange", "tab:green"), strict=True):
            sizes = [run["after backward"][f"{place} {kind}"] for run in firsts]
            spots = [number + shift for number in range(len(firsts))]
            label = f"{kind}, {'card' if place == 'card' else 'CPU memory'}"
            axis.bar(spots, sizes, 0.36, low, color=color, hatch=hatch, edgecolor="white", label=label)
            low = [one + other for one, other in zip(low, sizes, strict=True)]
        formula = [total(run["formula"], place) for run in firsts]
        spots = [(spot, size) for spot, size in zip(spots, formula, strict=True) if size or place == "card"]
        lines = [size for _, size in spots], [spot - 0.2 for spot, _ in spots], [spot + 0.2 for spot, _ in spots]
        axis.hlines(*lines, "black", label="formula" if hatch else None)
    axis.plot([n - 0.2 for n in range(len(firsts))], [run["peak"] for run in firsts], "rv", label="peak on the card")
    axis.set_xticks(
        range(len(firsts)), [f"{run['stage']}\nN={run['ranks']}" for run in firsts], fontsize=7, rotation=30
    )
    axis.set(ylabel="bytes a weight, one rank", title="held by a rank after the backward pass", ylim=(0, 22))
    axis.legend(fontsize=7, ncols=3, loc="upper right")
    return figure


if __name__ == "__main__":
    run_experiment(__file__, __doc__, experiment, table, figure, seeds=3)
