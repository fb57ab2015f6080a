"""Writes the run card: README.md in the run's folder, a model card as on the Hugging Face Hub."""

import dataclasses
import math
import re
import shlex
from pathlib import Path

from loguru import logger

from utils.config.config_file import is_own_recipe
from utils.data.mixture import format_times
from utils.model.adapter import ADAPTERS
from utils.run.plot import series, sources_of
from utils.run.samples import LONGEST, Sample
from utils.runtime.text import (
    Markdown,
    code_block,
    escape_markdown,
    format_setting,
    inline_code,
    markdown_table,
    settings_table,
)
from utils.storage.run_files import LEDGER_FILE
from utils.tasks import get_task
from utils.train.row_ledger import format_counts

CARD = "README.md"
_MARK = "<!-- written by main_train.py, and again by the next run into this folder -->"
# shown elsewhere in the card, or without effect on the result
_NOT_SETTINGS = (
    "config", "train_args_path", "model_name_or_path", "adapter_name_or_path", "train_data_path", "eval_data_path",
    "task_type", "output_dir", "resume_from_checkpoint", "overwrite_output_dir", "cache_dir", "local_rank", "precision",
    "card_samples", "row_ledger", "disable_tqdm", "deepspeed",
)  # fmt: skip
_MAIN = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "optim", "weight_decay", "max_grad_norm", "seed",
)  # fmt: skip
_ADAPTER = ("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_experts", "train_router",
            "use_dora", "use_rslora", "init_lora_weights", "loraplus_lr_ratio", "train_special_tokens")  # fmt: skip


def changed_settings(args, train_args) -> dict[str, tuple]:
    """Settings that differ from the defaults in the recipe and in utils/args.py: name → (default, value).

    Args:
        args: CommonArgs.
        train_args: the recipe's TrainArgument.
    """
    # values that follow from the machine, and from having rows to evaluate, are not settings
    given = {name: getattr(train_args, name) for name in ("output_dir", "bf16", "fp16", "use_cpu")}
    given |= {"eval_strategy": "no"} if train_args.eval_strategy == "no" else {}
    defaults, values = type(train_args)(**given).to_dict(), train_args.to_dict()
    for field in dataclasses.fields(args):
        defaults[field.name], values[field.name] = field.default, getattr(args, field.name)
    defaults |= {"max_prompt_length": args.max_len // 2} if args.max_prompt_length == args.max_len // 2 else {}
    if train_args.gradient_checkpointing is None:  # not yet decided by the model's size
        defaults |= dict.fromkeys(("gradient_checkpointing", "activation_checkpointing"))
    return {
        name: (defaults[name], value)
        for name, value in values.items()
        if name in defaults and value != defaults[name] and name not in _NOT_SETTINGS
        and not name.endswith("_token") and not name.startswith("hub_")
    }  # fmt: skip


def write_card(folder: Path, text: str) -> Path:
    """Writes the card as README.md, or as run_card.md next to a README.md that no run wrote.

    Returns:
        the card's file.
    """
    path = folder / CARD
    if path.exists() and not is_own_card(path):
        path = folder / "run_card.md"
        logger.warning("{} was not written by a run and is kept; the card is {}", folder / CARD, path.name)
    if path.exists() and not is_own_card(path):
        logger.warning("{} was not written by a run either, so no card is written", path)
        return path
    path.write_text(text, encoding="utf-8")
    return path


def is_own_card(path: Path) -> bool:
    """Whether a file is a card that a run wrote."""
    return path.is_file() and _MARK.encode() in path.read_bytes()


def card_text(
    record: dict, history: list[dict], changed: dict, samples: list[Sample], no_samples: str, folder: str
) -> str:
    """Returns the text of the card.

    Args:
        record: the run's record with its summary.
        history: the trainer's log.
        changed: from `changed_settings`.
        samples: questions and answers.
        no_samples: why there are none; empty if there are some.
        folder: the run's, for the command that repeats it.
    """
    common = record["common"]
    title = f"{common['task_type']} of {_name(common['model_name_or_path'])}"
    kind = ADAPTERS[common["train_mode"]].label
    config = shlex.quote(f"{folder}/train_args.json")
    command = f"{record['start']['command']} --config {config}{_flags_to_repeat(common)}"
    parts = [
        _front_matter(common), _MARK, f"# {escape_markdown(title)}",
        f"{kind} trained by `main_train.py`. ![loss](loss.png)",
        "## Result", settings_table(_result(record, history)), *_by_source(history),
        "## Base and data", settings_table(_base(record)), *_data(record),
        "## Settings", settings_table(_settings(record)),
        *_changed(changed), *_resumed(record),
        "## Answers before and after", *_answers(samples, no_samples),
        "## Machine", settings_table(_machine(record, history)),
        "## Repeat it", code_block(command, "bash"),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _flags_to_repeat(common: dict) -> str:
    """The flags that `--config` does not take from a file, because they run code."""
    recipe = common["train_args_path"]
    flags = "" if is_own_recipe(recipe) else f" --train_args_path {shlex.quote(recipe)}"
    return flags + (" --trust_remote_code true" if common.get("trust_remote_code") else "")


def _changed(changed: dict[str, tuple]) -> list[str]:
    if not changed:
        return ["All settings are the recipe's defaults."]
    rows = [
        (name, f"{format_setting(value)} (default: {format_setting(default)})")
        for name, (default, value) in changed.items()
    ]
    return ["Settings that differ from the recipe's defaults:", settings_table(rows)]


def _resumed(record: dict) -> list[str]:
    """The checkpoints that the run was resumed from, and the settings that changed there."""
    lines = []
    for resume in record.get("resumed") or []:
        changes = [
            escape_markdown(f"{name} {now} (it was {before})") for name, (before, now) in resume["changed"].items()
        ]
        other = f" with other settings, so that one command does not repeat it: {', '.join(changes)}" if changes else ""
        lines.append(f"Resumed from {inline_code(resume['from'])}{other}.")
    return lines


def _front_matter(common: dict) -> str:
    from huggingface_hub import ModelCardData

    base = common["model_name_or_path"]
    data = ModelCardData(
        # the Hub refuses a card whose base is not a name on the Hub
        base_model=base if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).is_dir() else None,
        library_name="peft" if ADAPTERS[common["train_mode"]].is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["llm-dojo", "trl", get_task(common["task_type"]).family, common["train_mode"]],
    )
    return f"---\n{data.to_yaml()}\n---"


def _name(path: str) -> str:
    return "/".join(Path(path).parts[-2:]) if not Path(path).is_absolute() else Path(path).name


def _result(record: dict, history: list[dict]) -> list[tuple]:
    summary = record["summary"]
    losses = [
        (entry["eval_loss"], entry["step"]) for entry in history if math.isfinite(entry.get("eval_loss", math.nan))
    ]
    best = min(losses, default=None)
    rows = [
        ("training loss", f"{_figure(summary['first_loss'])} at first, {_figure(summary['last_loss'])} at last"),
        ("evaluation loss", f"{losses[0][0]:.4f} at first, {losses[-1][0]:.4f} at last, "
         f"{best[0]:.4f} at best (step {best[1]:,})" if best else "not measured"),
    ]  # fmt: skip
    if summary.get("eval_accuracy") is not None:
        rows.append(("evaluation pairs", f"{100 * summary['eval_accuracy']:.1f} % with the higher reward for chosen"))
    if summary.get("best_kept"):
        rows.append(("saved weights", f"of step {summary['best_step']:,}, the best by {summary['best_figure']}"))
    if "row_ledger" in summary:
        rows.append(("rows, by their losses", Markdown(f"{format_counts(summary['row_ledger'])} (`{LEDGER_FILE}`)")))
    skipped = f", {summary['steps_skipped']:,} left out (not finite)" if summary.get("steps_skipped") else ""
    return [*rows, ("steps", f"{summary['steps']:,}{skipped}")]


def _by_source(history: list[dict]) -> list[str]:
    """The losses of each source, if they were logged."""
    sources = dict.fromkeys(sources_of(history) + sources_of(history, "eval_loss/"))
    if not sources:
        return []
    rows = []
    for source in sources:
        cells = [inline_code(source)]
        for name in (f"loss/{source}", f"eval_loss/{source}"):
            values = [value for value in series(history, name)[1] if math.isfinite(value)]
            cells.append(f"{values[0]:.4f} at first, {values[-1]:.4f} at last" if values else "not measured")
        rows.append(cells)
    return [markdown_table(["source", "training loss", "evaluation loss"], rows)]


def _base(record: dict) -> list[tuple]:
    common = record["common"]
    rows = [("base", _with_weights(record["base"]))]
    if "adapter" in record:
        rows.append(("started from the adapter", _with_weights(record["adapter"])))
    uses_template = get_task(common["task_type"]).uses_template
    template = inline_code(common["template_name"]) if uses_template else "none: plain text"
    if common.get("thinking", "auto") != "auto":
        template += f", thinking {common['thinking']}"
    rows.append(("chat template", template))
    if common.get("rope_scaling"):
        rows.append(("rope scaling", _rope_scaling(common)))
    return rows


def _rope_scaling(common: dict) -> Markdown:
    """The scaling, and for an adapter how other programs load it: its base's config.json does not have it."""
    text = inline_code(common["rope_scaling"])
    if not ADAPTERS[common["train_mode"]].is_adapter:
        return Markdown(f"{text}, saved in config.json")
    return Markdown(
        f"{text}. The base has none: `infer`, `evaluate` and `merge_lora` of this project apply it, `merge_lora` saves "
        "it; in another program set `config.rope_parameters` (with the base's rope_theta) before the base loads"
    )


def _with_weights(model: dict) -> Markdown:
    weights = f", weights {inline_code(model['fingerprint'])}" if model.get("fingerprint") else ""
    return Markdown(inline_code(model["path"]) + weights)


def _data(record: dict) -> list[str]:
    parts, files = [], []
    for part, rows in (("training", record["data"]["train"]), ("evaluation", record["data"].get("eval"))):
        if rows and "held_back" in rows:
            parts.append((part, "–", f"{rows['held_back']:,}, held back of the training rows", "–", "–", "–"))
        elif rows:
            reasons = [f"{count:,} {escape_markdown(reason)}" for reason, count in rows["dropped"].items()]
            dropped = ", ".join(reasons) or "none"
            dropped += f"; {rows['shortened']:,} shortened" if rows["shortened"] else ""
            counts = [f"{rows[name]:,}" for name in ("rows", "kept", "tokens", "trained_tokens")]
            parts.append((part, *counts[:2], dropped, *counts[2:]))
            files += [(inline_code(file["file"]), f"{file['bytes']:,}", _checksum(file)) for file in rows["files"]]
    return [
        markdown_table(["rows", "read", "kept", "left out", "tokens", "trained tokens"], parts),
        markdown_table(["file", "bytes", "sha256"], files),
        *_mixture(record),
    ]


def _mixture(record: dict) -> list[str]:
    """What was drawn of each source of a mixture."""
    table = (record.get("summary") or {}).get("mixture")
    if not table:
        return []
    rows = [
        (inline_code(line["source"]), f"{line['rows']:,} ({100 * line['share_of_rows']:.1f} %)",
         f"{line['tokens']:,} ({100 * line['share_of_tokens']:.1f} %)", format_times(line["epochs"]))
        for line in table
    ]  # fmt: skip
    drawn = "packed rows" if table[0].get("packed") else "rows"
    return [markdown_table(["source", f"{drawn} drawn", "tokens, by the mean of its rows", f"times its {drawn}"], rows)]


def _checksum(file: dict) -> Markdown:
    if "fingerprint" in file:
        return Markdown(f"{inline_code(file['fingerprint'])}, of size and parts (streamed)")
    return inline_code(file["sha256"])


def _settings(record: dict) -> list[tuple]:
    common, trainer = record["common"], record["trainer"]
    names = [name for name in _MAIN if name != "max_steps" or trainer.get(name, -1) > 0]
    rows = [
        ("task, recipe", Markdown(f"{escape_markdown(common['task_type'])}, {inline_code(common['train_args_path'])}"))
    ]
    rows += [("what is trained", common["train_mode"]), ("precision", common["precision"])]
    rows.append(("longest row", f"{common['max_len']:,} tokens"))
    if ADAPTERS[common["train_mode"]].is_adapter:
        names = [name for name in _ADAPTER if ADAPTERS[common["train_mode"]].takes(name)]
        values = {name: format_setting(common[name]) for name in names}
        if "lora_target_modules" in values and common["lora_target_modules"] is None:
            values["lora_target_modules"] = "every linear layer but the head"
        rows.append(("adapter", ", ".join(f"{name} {value}" for name, value in values.items())))
    rows += [("DeepSpeed", format_setting(trainer["deepspeed"]))] if trainer.get("deepspeed") else []
    return rows + [(name, format_setting(trainer[name])) for name in names if name in trainer]


def _machine(record: dict, history: list[dict]) -> list[tuple]:
    machine = record["hardware"]
    end = next((entry for entry in reversed(history) if "train_runtime" in entry), {})
    tokens = next((entry["num_tokens"] for entry in reversed(history) if "num_tokens" in entry), None)
    rows = [
        ("processor", f"{machine['cpu']}, {machine['cores']} cores, {machine['memory'] / 2**30:.0f} GiB of memory"),
        ("GPUs", ", ".join(machine["gpus"]) or "none"),
        ("processes", record["start"]["processes"]),
    ]
    if end:
        resumed = " (since it was resumed)" if record["trainer"].get("resume_from_checkpoint") else ""
        rows.append(("training time", f"{end['train_runtime']:,.0f} s{resumed}"))
    rows += [("tokens seen", f"{tokens:,.0f}")] if tokens else []
    if peak := record["summary"].get("gpu_memory"):
        rows.append(("GPU memory, peak of the first process", f"{peak / 2**30:.1f} GiB"))
    libraries = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return [*rows, ("system", f"{machine['system']}, Python {machine['python']}"), ("libraries", libraries)]


def _answers(samples: list[Sample], no_samples: str) -> list[str]:
    if not samples:
        return [f"No answers: {no_samples}."]
    lines = [f"Greedy, at most {LONGEST} tokens. The questions are rows of the data, as the model sees them."]
    for number, sample in enumerate(samples, 1):
        lines.append(f"### {number}")
        shown = [("", sample.prompt), ("Wanted:", sample.wanted), ("Before:", sample.before), ("After:", sample.after)]
        for title, text in shown:
            lines += [title, code_block(text)] if title else [code_block(text)]
    return lines


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"
