"""The table of gpu_throughput.py, from its results."""

from statistics import median

OURS, TRL = "LLM-Dojo", "TRL"
SHOWN, MODES, SETTINGS = ("0.5b", "1.5b", "7b"), ("lora", "full"), ("default", "best")
TRAINED = {"lora": "LoRA", "full": "full"}


def key(run: dict) -> tuple:
    """What tells one run from the others."""
    return tuple(run[name] for name in ("shape", "mode", "setting", "program", "repeat"))


def table(results: dict | None, shapes: tuple[str, ...] = SHOWN) -> str:
    """Each program's median of the repeats, with the range where there are several; `None`: nothing is measured."""
    runs = results["runs"] if results else []
    lines = [
        "| Qwen2.5's shape | trained | setting | LLM-Dojo | TRL | tokens/s, LLM-Dojo : TRL |",
        "|---|---|---|---|---|---|",
    ]
    for shape in shapes:
        for mode in MODES:
            for setting in SETTINGS:
                found = {
                    name: [run for run in runs if key(run)[:4] == (shape, mode, setting, name)] for name in (OURS, TRL)
                }
                cells = [shape.upper(), TRAINED[mode], setting, _cell(found[OURS]), _cell(found[TRL]), _ratio(**found)]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _conditions(results)])


def _cell(runs: list[dict]) -> str:
    good = [run for run in runs if "failed" not in run]
    if not good:
        reasons = {run["failed"] for run in runs}
        return "not measured" if not runs else "out of memory" if reasons == {"out of memory"} else "failed"
    speeds, shares = ([run[name] for run in good] for name in ("tokens_per_second", "share_of_peak"))
    spread = f" ({min(speeds):,.0f} to {max(speeds):,.0f})" if len(speeds) > 1 else ""
    share = f", {100 * median(shares):.0f} % of the peak" if None not in shares else ""
    again = ", checkpointing" if any(run["gradient_checkpointing"] for run in good) else ""
    return f"{median(speeds):,.0f} tokens/s{spread}{share}, {max(run['peak_gb'] for run in good):.1f} GB{again}"


def _ratio(**found: list[dict]) -> str:
    speeds = {
        name: {run["repeat"]: run["tokens_per_second"] for run in runs if "failed" not in run}
        for name, runs in found.items()
    }
    ratios = [speeds[OURS][repeat] / speeds[TRL][repeat] for repeat in speeds[OURS].keys() & speeds[TRL].keys()]
    if not ratios:
        return "not measured" if not all(found.values()) else "–"
    spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
    return f"{median(ratios):.2f}{spread}"


def _conditions(results: dict | None) -> str:
    if results is None:
        return "Not measured yet: there was no GPU."
    card, settings = results["card"], results["settings"]
    where = card["name"]
    if card["memory_gb"]:
        where += f", {card['memory_gb']:g} GB, driver {card['driver'] or 'unknown'}, CUDA {card['cuda']}"
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    repeats = max((run["repeat"] + 1 for run in results["runs"]), default=0)
    known = any(run.get("share_of_peak") for run in results["runs"])
    words = [
        f"{where}; {versions}.",
        f"{settings['steps']} steps, of which the first {settings['warm_up']} do not count; {settings['rows']} rows a "
        f"step, or as many tokens in packed rows of {settings['max_len']:,}; repeats: {repeats}; seed "
        f"{settings['seed']}{'; compiled' if settings['torch_compile'] else ''}.",
    ]
    if not known and results["runs"]:
        words.append("The share of the peak is left out: the card's is not in benchmarks/model_flops.py.")
    return " ".join(words)
