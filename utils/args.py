"""The arguments that every recipe shares, and `parse_args`, which reads them together with the recipe's own."""

import sys
from dataclasses import dataclass
from typing import Literal

from utils.config.flags import arg
from utils.config.parse import parse
from utils.tasks import TASKS, get_task
from utils.tasks.task import Task


@dataclass
class CommonArgs:
    """What every recipe needs. Edit a default here, or give the flag of the same name."""

    _argument_group_name = "common arguments (utils/args.py)"

    config: str | None = arg(
        None,
        "Repeat a run: its train_args.json, whose settings count as flags. Flags given as well replace them; "
        "output_dir, resume_from_checkpoint, push_to_hub, cache_dir and trust_remote_code are not taken over, and a "
        "recipe outside of train_args/ only if it is typed as well. Also a JSON object of flags.",
    )
    train_args_path: str = arg("train_args/sft/base.py", "The recipe: a file with a dataclass TrainArgument.")
    model_name_or_path: str = arg(
        "data/tiny_model", "The base model: a folder, or a name on a hub such as Qwen/Qwen1.5-7B."
    )
    adapter_name_or_path: str | None = arg(
        None, "A trained adapter to go on from, with its base and settings; --train_mode full merges it first."
    )
    train_data_path: str | None = arg(
        None,
        "Files (jsonl, json, csv, parquet; txt for pretrain), folders or globs, separated by commas. Of a folder "
        "whose files are named after splits, as on the hub, the training split is taken. "
        "Default: the task's own sample in data/.",
    )
    eval_data_path: str | None = arg(
        None,
        "The validation rows, given as for --train_data_path; of a folder its validation split, else its test split.",
    )
    val_size: float = arg(
        0.0,
        "Without --eval_data_path: how much of the training rows to hold back for validation, "
        "a share below 1 or a number of rows.",
    )
    task_type: Literal[tuple(TASKS)] | None = arg(
        None, "The task. Default: the recipe's own; another one is refused by a recipe that cannot do it."
    )
    train_mode: Literal["full", "lora", "qlora"] = arg(
        "lora", "What is trained: every weight, low-rank adapters, or adapters on a base quantised to 4 bits (NF4)."
    )
    template_name: str = arg("qwen", "The chat format; it must be the one the base model knows.")
    template_date: str | None = arg(
        None, "The day, as 2026-01-31, that a template of `auto` prints. Default: today, and of a resumed run its own."
    )
    max_len: int = arg(1024, "The longest row in tokens; see --overlong.")
    max_prompt_length: int = arg(512, "The longest prompt of a preference pair in tokens (dpo).")
    on_bad_row: Literal["auto", "error", "drop"] = arg(
        "auto",
        "auto: a malformed row stops the run, a row with an empty answer is dropped and named. "
        "error: both stop it. drop: both are dropped and named.",
    )
    train_on: Literal["all_turns", "last_turn"] = arg("all_turns", "Which answers of a conversation are trained.")
    overlong: Literal["truncate", "drop", "error"] = arg(
        "truncate",
        "A row longer than --max_len. truncate: it loses its oldest turns, then the beginning of its last question; "
        "an answer is never cut, and a row that still does not fit is dropped. drop: left out. error: stops the run.",
    )
    allow_special_tokens_in_content: bool = arg(
        False,
        "Let a special token's text within a row, such as <|im_end|>, become that token. "
        "Off: it stays plain text, so that data cannot forge a turn.",
    )
    cache_dir: str | None = arg(
        None, "Where tokenised rows are kept. Default: llm_dojo in the datasets library's cache."
    )
    on_nan: Literal["stop", "skip"] = arg(
        "stop", "A loss or gradients that are not finite. stop: names the step and its rows. skip: leaves the step out."
    )
    early_stopping_patience: int | None = arg(
        None,
        "Stop after so many evaluations in a row that were no better than the best; 0 or none: never. "
        "The best weights are kept (--load_best_model_at_end, --metric_for_best_model).",
    )
    early_stopping_threshold: float = arg(
        0.0, "How much better than the best an evaluation must be to count (--early_stopping_patience)."
    )
    card_samples: int = arg(
        3,
        "How many questions of the validation rows (else the training rows) README.md shows with answers; 0 for none.",
    )
    doctor: Literal["on", "off"] = arg(
        "on",
        "Check rows, settings, disk and memory before the weights load, and stop on errors (utils/doctor/examine.py).",
    )
    overwrite_output_dir: bool = arg(False, "Train into a folder that already holds a finished run, replacing it.")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = arg(
        "auto", "The arithmetic. auto: bf16 where the device has it, else fp16 on CUDA, else fp32."
    )
    attn_implementation: Literal["auto", "sdpa", "flash_attention_2", "eager"] = arg(
        "auto", "The attention code. auto: flash attention where GPU, package and model have it, else mostly SDPA."
    )
    trust_remote_code: bool = arg(False, "Run Python code that comes with the model. Off: such code is never run.")

    use_dora: bool = arg(False, "DoRA: also train the magnitude of each adapted weight (arXiv 2402.09353).")
    lora_rank: int = arg(16, "The rank r of the adapters.")
    lora_alpha: float = arg(32, "The adapters' scale: their output counts alpha / r times.")
    lora_dropout: float = arg(0.0, "Dropout on the adapters' input.")
    lora_target_modules: str | None = arg(
        None,
        "The modules that get an adapter, names separated by commas. "
        "Default: every linear layer that text goes through and PEFT can adapt, except the head and the routers of a "
        "mixture of experts.",
    )
    use_rslora: bool = arg(False, "Rank-stabilised LoRA: scale by alpha / sqrt(r) (arXiv 2312.03732).")
    init_lora_weights: Literal["default", "pissa"] = arg(
        "default", "How adapters start. pissa: from the base's main singular vectors (arXiv 2404.02948)."
    )
    loraplus_lr_ratio: float | None = arg(
        None, "LoRA+: B learns this many times faster than A, 16 in the paper (arXiv 2402.12354)."
    )
    train_special_tokens: Literal["auto", "on", "off"] = arg(
        "auto",
        "Whether LoRA also trains the embeddings of the template's special tokens. "
        "auto: of those that the base never trained, told by their norms.",
    )

    @property
    def task(self) -> Task:
        """The task of `--task_type`."""
        return get_task(self.task_type)


def parse_args(argv: list[str] | None = None, needs_weights: bool = True):
    """Reads the recipe and the flags, and checks everything that needs no model.

    Args:
        argv: the flags; the command line's by default.
        needs_weights: whether the base must have weights beside its config.json.

    Returns:
        (CommonArgs, TrainArgument)

    Raises:
        UserError: with every problem at once.
    """
    return parse_with_sources(argv, needs_weights)[:2]


def parse_with_sources(argv: list[str] | None = None, needs_weights: bool = True):
    """As `parse_args`; returns (CommonArgs, TrainArgument, Sources), the last says where each value came from."""
    return parse(list(sys.argv[1:] if argv is None else argv), CommonArgs, TASKS, needs_weights)
