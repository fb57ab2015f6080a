"""Full fine-tuning, LoRA and DoRA on digits that lie on their side.

python -m llm_tricks.lora_dora.run --write           # 150 steps, three seeds, under half a minute
python -m llm_tricks.lora_dora.run --long --write    # 1,000 steps and one rank more, some minutes

The learning rate of each method is the one that reads most of 60 held-back pictures right, on average over the seeds.
Accuracy is that on the whole test set, 897 pictures nobody trained or chose anything on.
"""

from itertools import product
from statistics import mean

import torch

from llm_tricks.experiment import mean_and_spread, run_experiment
from llm_tricks.notebook import definitions

RATES = (3e-3, 1e-2, 3e-2, 1e-1)
ADAPTERS = ("lora", "dora", "dora, whole gradient")
TUNE, CHOOSE = slice(600, 840), slice(840, 900)  # of the pictures the notebook sets aside for tuning


def experiment(seeds: list[int], long: bool) -> dict:
    """Accuracy of each method, rank, rate and seed."""
    nb = definitions("lora_dora")
    torch.set_num_threads(1)
    kinds = [("full", 0), *product(ADAPTERS, (1, 4, 8) if long else (1, 4))]
    runs = []
    for seed in seeds:
        torch.manual_seed(seed)
        base = nb.train(nb.network(), *nb.digits(False, nb.BASE_PART), steps=400, lr=3e-3)
        for kind, rank in kinds:
            for rate in RATES:
                torch.manual_seed(seed)
                model = nb.train(
                    nb.adapt(base, kind, rank), *nb.digits(True, TUNE), steps=1000 if long else 150, lr=rate
                )
                run = {"kind": kind, "rank": rank, "rate": rate, "seed": seed}
                run["weights"] = sum(w.numel() for w in model.parameters() if w.requires_grad)
                run["chosen_by"] = nb.accuracy(model, *nb.digits(True, CHOOSE))
                run["test"] = nb.accuracy(model, *nb.digits(True, nb.TEST_PART))
                runs.append(run)
        print(f"seed {seed} done", flush=True)
    return {"runs": runs}


def best(results: dict) -> list[dict]:
    """For each method and rank, its runs at the learning rate that did best on the pictures to choose by."""
    found = []
    for kind, rank in dict.fromkeys((run["kind"], run["rank"]) for run in results["runs"]):
        of_kind = [run for run in results["runs"] if (run["kind"], run["rank"]) == (kind, rank)]
        by_rate = {rate: [run for run in of_kind if run["rate"] == rate] for rate in RATES}
        rate = max(RATES, key=lambda rate: mean(run["chosen_by"] for run in by_rate[rate]))
        found.append({"kind": kind, "rank": rank, "rate": rate, "weights": of_kind[0]["weights"]})
        found[-1]["test"] = [run["test"] for run in by_rate[rate]]
    return found


def table(results: dict) -> str:
    """The README's table."""
    lines = ["| method | rank | weights trained | learning rate chosen | test accuracy, % |", "|---|---|---|---|---|"]
    for row in best(results):
        cells = (row["kind"], row["rank"] or "", f"{row['weights']:,}", f"{row['rate']:g}")
        lines.append(f"| {' | '.join(map(str, cells))} | {mean_and_spread(row['test'], scale=100)} |")
    return "\n".join(lines)


def figure(results: dict):
    """Accuracy over the number of trained weights."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.2))
    for kind in ("full", *ADAPTERS):
        rows = [row for row in best(results) if row["kind"] == kind]
        points = [mean(row["test"]) * 100 for row in rows]
        low_high = [
            [middle - min(row["test"]) * 100 for middle, row in zip(points, rows, strict=True)],
            [max(row["test"]) * 100 - middle for middle, row in zip(points, rows, strict=True)],
        ]
        axis.errorbar([row["weights"] for row in rows], points, low_high, label=kind, marker="o", capsize=3)
    axis.set(xscale="log", xlabel="weights trained", ylabel="test accuracy, %", title="digits on their side")
    axis.legend()
    return figure


if __name__ == "__main__":
    run_experiment(__file__, __doc__, experiment, table, figure)
