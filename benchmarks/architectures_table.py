"""The pages made from benchmarks/architectures.json: benchmarks/architectures.md, and a table in docs/models.md."""

import re
from pathlib import Path

from benchmarks.architectures_models import ROOT
from benchmarks.architectures_work import (
    GRADIENT_TOLERANCE,
    LOGITS_TOLERANCE,
    LOSS_TOLERANCE,
    MERGE_TOLERANCE,
    MODES,
)
from benchmarks.tables import write_table

PAGE = ROOT / "benchmarks" / "architectures.md"
MODELS = ROOT / "docs" / "models.md"
NAME = "benchmarks/architectures.json"
# families that people ask for → the architectures, as in config.json's model_type
FAMILIES = {
    "Qwen2, Qwen2.5": ["qwen2", "qwen2_moe"],
    "Qwen3": ["qwen3", "qwen3_moe", "qwen3_next"],
    "Qwen3.5, Qwen3.6": ["qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"],
    "Llama-2, Llama-3.x, R1 distills, InternLM2, Yi": ["llama"],
    "Llama-4": ["llama4", "llama4_text"],
    "Gemma-3": ["gemma3", "gemma3_text", "gemma3n_text"],
    "Gemma-4": ["gemma4", "gemma4_text"],
    "Phi-3, Phi-4": ["phi3", "phi4_multimodal", "phimoe"],
    "GLM-4, GLM-4.5": ["glm", "glm4", "glm4_moe"],
    "gpt-oss": ["gpt_oss"],
    "DeepSeek V3, R1": ["deepseek_v3"],
    "DeepSeek V2, V3.2, V4": ["deepseek_v2", "deepseek_v32", "deepseek_v4"],
    "Mistral, Ministral": ["mistral", "ministral", "ministral3"],
    "Mixtral": ["mixtral"],
    "LFM2, LFM3": ["lfm2", "lfm2_moe", "lfm3"],
    "Cohere, Command A": ["cohere", "cohere2", "cohere2_moe"],
    "Nemotron-H, Nemotron-3": ["nemotron_h"],
    "InternLM3": ["internlm3"],
    "SmolLM3": ["smollm3"],
    "OLMo, OLMoE": ["olmo2", "olmo3", "olmoe"],
}
NAMES = {"full": "full", "lora": "LoRA"}
KINDS = {
    "works": "rows are laid end to end",
    "works padded": "the model, or its code, needs padded rows; one line in the log says so",
    "refused": "before the training, with the reason",
    "wrong": "",
}


def is_right(line: dict) -> bool:
    """Whether nothing about it is silently different: trained as plain transformers, or refused in words."""
    return "not_built" in line or all(kind_of(line[mode]) != "wrong" for mode in MODES)


def kind_of(found: dict) -> str:
    """A key of `KINDS`."""
    if "refused" in found:
        return "refused"
    if "crashed" in found or found["problems"]:
        return "wrong"
    return "works" if found["layout"] == "end to end" else "works padded"


def cell(found: dict) -> str:
    """`works padded`, `refused: …` or `wrong: …`, with what else is to be known."""
    kind = kind_of(found)
    if kind == "refused":
        text = found["refused"].partition(": ")[2] or found["refused"]
        return "refused: " + _plain(text)[:140]
    if kind == "wrong":
        return "wrong: " + _plain(found.get("crashed") or "; ".join(found["problems"]))
    return "; ".join([kind, *notes_of(found)])


def notes_of(found: dict) -> list[str]:
    """What a model that trains cannot do afterwards, with the reason."""
    notes = []
    if isinstance(found.get("merged"), str):
        notes.append("merging is refused: " + _plain(found["merged"])[:140])
    if "not_possible" in found.get("generates", {}):
        notes.append("transformers cannot generate with it: " + _plain(found["generates"]["not_possible"])[:100])
    return notes


def _plain(text: str) -> str:
    return text.replace("|", "\\|")


def counts(lines: list[dict], mode: str) -> dict[str, int]:
    """How many of the architectures that were built are of each kind."""
    kinds = [kind_of(line[mode]) for line in lines if "not_built" not in line]
    return {kind: kinds.count(kind) for kind in KINDS}


def counts_table(lines: list[dict]) -> list[str]:
    """The counts of all kinds in all modes; a kind without any is left out, but for the refused."""
    found = {mode: counts(lines, mode) for mode in MODES}
    rows = []
    for kind, meaning in KINDS.items():
        numbers = [str(found[mode][kind]) for mode in MODES]
        if kind != "wrong" or set(numbers) != {"0"}:
            rows.append(f"| {kind}{': ' * bool(meaning)}{meaning} | {' | '.join(numbers)} |")
    return ["| | full | LoRA |", "|---|---|---|", *rows]


def page(results: dict, untried: str) -> str:
    """benchmarks/architectures.md: counts, then a row for each architecture.

    Args:
        results: of architectures.json.
        untried: what stands for an architecture that was not run yet.
    """
    lines = results["models"]
    built = [line for line in lines if "not_built" not in line]
    tried = sum(line.get("not_built") != untried for line in lines)
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    head = [
        "# Architectures", "",
        f"Written by `python -m benchmarks.architectures` on a CPU in float32 ({versions}). {tried} of the "
        f"{len(lines)} causal language models of transformers were tried, and {len(built)} of them could be built "
        "small.", "",
        *counts_table(lines), "",
        "What works is equal to plain transformers and PEFT:", "",
        "- The loss of the first step, in the run's layout and padded, is that of rows one by one to "
        f"{LOSS_TOLERANCE:g}, and its gradients are the same to {GRADIENT_TOLERANCE:g} of their norm.",
        "- What is saved is loaded by plain transformers, or by PEFT on the base. Its logits are those of the trained "
        f"model in memory to {LOGITS_TOLERANCE:g} of the largest, and its loss is the run's evaluation loss.",
        "- The trained model in memory, the reloaded one, and `infer` with both prompts in one batch give the same "
        "greedy answers.",
        f"- `merge_lora` writes a model with the adapter's logits to {MERGE_TOLERANCE:g} of the largest.", "",
        "| architecture | full | LoRA |", "|---|---|---|",
    ]  # fmt: skip
    rows = [f"| {line['architecture']} | {cell(line['full'])} | {cell(line['lora'])} |" for line in built]
    missing = [f"- {line['architecture']}: {line['not_built']}" for line in lines if "not_built" in line]
    return "\n".join([*head, *rows, "", "Not built:", "", *missing, ""])


def families_table(results: dict) -> str:
    """docs/models.md: the counts, the families that people ask for, and the reasons of what is refused."""
    lines = {line["architecture"]: line for line in results["models"] if "not_built" not in line}
    rows = ["| Models | Architecture | full | LoRA |", "|---|---|---|---|"]
    for family, kinds in FAMILIES.items():
        for kind in (kind for kind in kinds if kind in lines):
            cells = [cell(lines[kind][mode]) for mode in MODES]
            rows.append(f"| {family} | `{kind}` | {' | '.join(cells)} |")
            family = ""
    return "\n".join([*counts_table(results["models"]), "", *rows, "", *reasons_table(list(lines.values()))])


def reasons_table(lines: list[dict]) -> list[str]:
    """The reasons of what is refused before the training, each with its architectures."""
    rows = ["| Refused | Mode | Architectures |", "|---|---|---|"]
    for modes, reason, kinds in _reasons(lines):
        rows.append(f"| {reason} | {modes} | {', '.join(f'`{kind}`' for kind in kinds)} |")
    return rows


def _reasons(lines: list[dict]) -> list[tuple[str, str, list[str]]]:
    """(modes, reason without figures and names, architectures), as in `[("full, LoRA", "the model …", ["bert"])]`."""
    found: dict[tuple, list[str]] = {}
    for line in lines:
        texts: dict[str, list[str]] = {}
        for mode in MODES:
            if "refused" in line[mode]:
                texts.setdefault(_general(line[mode]["refused"]), []).append(NAMES[mode])
        for text, modes in texts.items():
            found.setdefault((", ".join(modes), text), []).append(line["architecture"])
    return [(modes, text, kinds) for (modes, text), kinds in found.items()]


def _general(text: str) -> str:
    """The reason without figures, names of classes and remedies, so that those of several models are equal."""
    text = (text.partition(": ")[2] or text).partition("; ")[0]
    text = re.sub(r" \([^)]*\)", "", text)
    text = re.sub(r"(<\|\w+\|>(, )?)+", "special tokens", text)
    return _plain(re.sub(r"the head of \w+ has", "the model's head has", text))


def write_pages(results: dict, folder: Path = ROOT) -> None:
    """Writes benchmarks/architectures.md, completely or not at all, and the table in docs/models.md."""
    from benchmarks.architectures import UNTRIED

    file = folder / PAGE.relative_to(ROOT)
    part = file.with_name(file.name + ".part")
    part.write_text(page(results, UNTRIED), encoding="utf-8")
    part.replace(file)
    write_table(folder / MODELS.relative_to(ROOT), NAME, families_table(results))
