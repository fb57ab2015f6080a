"""DPO, cDPO, IPO and DPO per token on the preference pairs and the tiny model of this repository.

python -m llm_tricks.dpo.run                   # six steps, three seeds, under half a minute
python -m llm_tricks.dpo.run --long --write    # one pass over the pairs, three settings; keeps its results

The model is fine-tuned on half chosen, half rejected answers first; that is start and reference of every run. A seed
draws the order of the pairs, and which labels are turned round. β is the one of two with the highest accuracy on 20
held-back pairs, on average over the seeds (of equals, the one that leaves the chosen answers likeliest). All other
figures are those of 40 further held-back pairs.
"""

from functools import partial
from pathlib import Path
from statistics import mean

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_tricks.experiment import mean_and_spread, run_experiment
from llm_tricks.notebook import definitions

DATA = Path(__file__).resolve().parents[2] / "data"
BETAS = {"dpo": (0.1, 0.5), "cdpo": (0.1, 0.5), "ipo": (0.1, 0.5), "dpo_norm": (1.0, 4.0)}
# name: share of labels turned round, learning rate
SETTINGS = {
    "rate 1e-4": (0.0, 1e-4),
    "rate 1e-4, 25% flipped": (0.25, 1e-4),
    "rate 4e-4": (0.0, 4e-4),
}
CHOOSE, TEST = slice(20), slice(20, 60)


@torch.no_grad()
def answers(model, pairs: list[dict], end: int, longest: int = 32) -> list[list[int]]:
    """The model's own answers, the likeliest token each time, with the end token where it comes."""
    width = max(len(pair["prompt_ids"]) for pair in pairs)
    ids = torch.tensor([[0] * (width - len(pair["prompt_ids"])) + pair["prompt_ids"] for pair in pairs])
    mask = torch.tensor([[0] * (width - len(p["prompt_ids"])) + [1] * len(p["prompt_ids"]) for p in pairs])
    said = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=longest, do_sample=False, eos_token_id=end, pad_token_id=0
    )[:, width:].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in said]


def in_its_own_words(model, pairs: list[dict], end: int) -> dict:
    """The mean length of its answers in tokens, and the share that is the chosen answer, token for token."""
    said = answers(model, pairs, end)
    right = [answer == pair["chosen_ids"] for answer, pair in zip(said, pairs, strict=True)]
    return {"length": mean(map(len, said)), "right": mean(right)}


def turned(nb, pairs: list[dict], reference, flip) -> tuple[list[dict], torch.Tensor]:
    """The pairs, those of `flip` [n] turned round, and the reference's log-probabilities [2n] in the same order."""
    labelled = [nb.swapped(pair) if turn else pair for pair, turn in zip(pairs, flip, strict=True)]
    return labelled, torch.where(flip.repeat(2), reference.roll(len(pairs)), reference)


def experiment(seeds: list[int], long: bool) -> dict:
    """The figures of each setting, loss, β and seed."""
    nb = definitions("dpo")
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(DATA / "tiny_model")
    base = AutoModelForCausalLM.from_pretrained(DATA / "tiny_model", dtype=torch.float32)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    pairs = nb.read_pairs(DATA / "dpo_single_data.jsonl", tokenizer)
    choose, test = (nb.read_pairs(DATA / "dpo_single_eval_data.jsonl", tokenizer)[part] for part in (CHOOSE, TEST))
    pairs, test = (pairs, test) if long else (pairs[:40], test[:20])
    both = [nb.swapped(pair) if number % 2 else pair for number, pair in enumerate(pairs)]
    torch.manual_seed(0)
    start = nb.fine_tune(base, both, steps=24 if long else 12)
    reference, on = (nb.measure(start, part)[0] for part in (pairs, test))
    by = nb.measure(start, choose)[0] if long else None
    runs, begun = [], {**nb.figures(start, test, on), **in_its_own_words(start, test, end)}
    for seed in seeds:
        for setting, (share, rate) in SETTINGS.items() if long else [("rate 1e-4", (0.0, 1e-4))]:
            flip = torch.rand(len(pairs), generator=torch.Generator().manual_seed(seed)) < share
            labelled, labels = turned(nb, pairs, reference, flip)
            for kind in nb.LOSSES:
                for beta in BETAS[kind] if long else BETAS[kind][:1]:
                    loss, per_token = nb.LOSSES[kind]
                    if kind == "cdpo":  # it is told the share; a tenth where there is none
                        loss = partial(loss, flipped=share or 0.1)
                    options = {"steps": 40 if long else 6, "lr": rate, "seed": seed}
                    model, _, _ = nb.train(start, labelled, labels, loss, beta, per_token, **options)
                    run = {"setting": setting, "kind": kind, "beta": beta, "seed": seed}
                    run["chosen_by"] = nb.figures(model, choose, by) if long else None
                    runs.append(run | nb.figures(model, test, on) | in_its_own_words(model, test, end))
            print(f"seed {seed}, {setting} done", flush=True)
    return {"start": begun, "runs": runs}


def best(results: dict) -> list[dict]:
    """For each setting and loss, its runs with the β that did best on the pairs to choose by."""
    found = []
    for setting, kind in dict.fromkeys((run["setting"], run["kind"]) for run in results["runs"]):
        by_beta: dict = {}
        for run in results["runs"]:
            if (run["setting"], run["kind"]) == (setting, kind):
                by_beta.setdefault(run["beta"], []).append(run)

        def score(beta, by_beta=by_beta):
            return tuple(mean(run["chosen_by"][name] for run in by_beta[beta]) for name in ("accuracy", "chosen"))

        beta = max(by_beta, key=score) if len(by_beta) > 1 else next(iter(by_beta))
        found.append({"setting": setting, "kind": kind, "beta": beta, "runs": by_beta[beta]})
    return found


COLUMNS = {  # of a run: the README's heading, digits, scale
    "accuracy": ("accuracy, %", 1, 100),
    "margin": ("margin, nats", 1, 1),
    "chosen moved": ("chosen moved, nats", 2, 1),
    "rejected moved": ("rejected moved, nats", 1, 1),
    "right": ("own answer right, %", 1, 100),
    "length": ("own answer, tokens", 1, 1),
}


def table(results: dict) -> str:
    """The README's table."""
    headings = ["setting", "loss", "β", *(heading for heading, _, _ in COLUMNS.values())]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    start = [f"{results['start'][name] * scale:.{digits}f}" for name, (_, digits, scale) in COLUMNS.items()]
    lines.append(f"| before | none |  | {' | '.join(['', '', '', '', *start[4:]])} |")
    for row in best(results):
        cells = [
            mean_and_spread([run[name] for run in row["runs"]], digits, scale)
            for name, (_, digits, scale) in COLUMNS.items()
        ]
        lines.append(f"| {row['setting']} | {row['kind']} | {row['beta']:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(results: dict):
    """How far chosen and rejected answers moved, every run with the β chosen for its loss."""
    import matplotlib.pyplot as plt

    rows = best(results)
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    figure, axes = plt.subplots(
        1, len(settings), figsize=(3.4 * len(settings), 3.2), layout="constrained", squeeze=False
    )
    colors = {"dpo": "tab:blue", "cdpo": "tab:orange", "ipo": "tab:green", "dpo_norm": "tab:red"}
    for axis, setting in zip(axes[0], settings, strict=True):
        for row in rows:
            if row["setting"] == setting:
                points = [[run[f"{side} moved"] for run in row["runs"]] for side in ("rejected", "chosen")]
                axis.scatter(*points, color=colors[row["kind"]], label=row["kind"], s=22)
        axis.axhline(0, color="grey", linestyle=":")
        axis.set(xlabel="log π(rejected) moved, nats")
        axis.set_title(setting, fontsize=10)
    axes[0, 0].set_ylabel("log π(chosen) moved, nats")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(colors), fontsize=8)
    return figure


if __name__ == "__main__":
    run_experiment(__file__, __doc__, experiment, table, figure, seeds=3)
