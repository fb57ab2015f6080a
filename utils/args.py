"""The arguments that every recipe shares, and `parse_args`, which reads them together with the recipe's own."""

import sys
from dataclasses import dataclass, replace
from typing import Literal

from utils.config.flags import arg
from utils.config.parse import parse
from utils.data.columns import COLUMNS_HELP, parse_columns
from utils.model.adapter import ADAPTERS
from utils.tasks import TASKS, get_task
from utils.tasks.task import Task
from utils.template.thinking import MODES


@dataclass
class CommonArgs:
    """Arguments of every recipe. Edit a default here, or give the flag of the same name."""

    _argument_group_name = "common arguments (utils/args.py)"

    config: str | None = arg(
        None,
        "Repeat a run: its train_args.json, whose settings are read as flags. Flags of the command line replace them. "
        "output_dir, resume_from_checkpoint, push_to_hub, cache_dir and trust_remote_code are ignored, and a recipe "
        "outside of train_args/ must be given as a flag. A JSON object of flags is accepted, too.",
    )
    train_args_path: str = arg("train_args/sft/base.py", "The recipe: a Python file with a dataclass TrainArgument.")
    model_name_or_path: str = arg(
        "data/tiny_model",
        "The base model: a folder, a GGUF file, a name on a hub such as Qwen/Qwen1.5-7B, or the short name smollm2, a "
        "small real model. A GGUF file and a short name are converted to a folder once.",
    )
    adapter_name_or_path: str | None = arg(
        None, "A LoRA adapter to continue training, with its base and settings; --train_mode full merges it first."
    )
    train_data_path: str | None = arg(
        None,
        "Training data: files (jsonl, json, csv, parquet, arrow; txt for pretrain), folders, globs; separated by "
        "commas. "
        "In a folder whose files are named after splits, as on the hub, only the training split is read. "
        "A mixture: weights after colons, a.jsonl:0.7,b.parquet:0.3, or a YAML file with a list of sources "
        "(docs/data.md). "
        "Default: the task's sample in data/.",
    )
    eval_data_path: str | None = arg(
        None,
        "Evaluation data: files, folders and globs, as for --train_data_path, without weights and YAML files; in a "
        "folder with splits, the validation split, else the test split.",
    )
    val_size: float = arg(
        0.0,
        "Without --eval_data_path: how many training rows to hold out for evaluation, a share below 1 or a number of "
        "rows.",
    )
    task_type: Literal[tuple(TASKS)] | None = arg(
        None, "The task; it must be one of the recipe's task_types. Default: the first of these."
    )
    train_mode: Literal[tuple(ADAPTERS)] = arg(
        "lora",
        "full: train every weight. lora: train low-rank adapters. qlora: adapters on a base quantised to 4 bits (NF4).",
    )
    trainable_layers: int | None = arg(
        None, "With --train_mode full: train the last so many layers only; below 0: the first. Default: all weights."
    )
    trainable_modules: str | None = arg(
        None,
        "With --train_mode full: train the weights only in whose names this regular expression is found, such as "
        "'norm|lm_head'; with --trainable_layers, these as well.",
    )
    columns: str | None = arg(None, COLUMNS_HELP)
    streaming: bool = arg(
        False,
        "Read, check and tokenise the training rows during the training; none is kept on disk or all in memory. "
        "For files larger than either. A row that is dropped leaves its place in its step empty.",
    )
    shuffle_buffer: int = arg(
        10_000,
        "With --streaming true: how many rows are shuffled among each other, after parts of files of 256 rows "
        "(Parquet: row groups) are. Each process, and each of --dataloader_num_workers, holds their text in memory.",
    )
    mixing_strategy: Literal["concat", "interleave", "weighted"] | None = arg(
        None,
        "How an epoch mixes the entries of --train_data_path. concat: all rows of each, shuffled together. interleave: "
        "a row of each in turn. weighted: as many of each as the weights say. Default: weighted where they have "
        "weights, concat in a YAML file without; a plain list of files is not a mixture.",
    )
    mixing_unit: Literal["rows", "tokens"] = arg(
        "rows", "With weighted: whether weights are shares of the rows (packed ones, with --packing) or of the tokens."
    )
    mixing_stop: Literal["first_exhausted", "all_exhausted"] = arg(
        "first_exhausted",
        "With interleave and weighted: an epoch ends with the last row of the first source that is used up, or once "
        "all are, and the others begin anew.",
    )
    curriculum: str = arg(
        "none",
        "none; length: rows in order of their tokens, short first; column:NAME: in order of a number in the raw rows, "
        "small first. Every epoch has the same order.",
    )
    template_name: str = arg(
        "qwen",
        "The chat template, the one the base model was trained with; auto: the tokenizer's own, the default for a GGUF "
        "file and a short name.",
    )
    template_date: str | None = arg(
        None,
        "The date, as 2026-01-31, that gpt-oss and some templates of `auto` print. Default: today; when resuming, the "
        "run's date.",
    )
    thinking: Literal[MODES] = arg(
        "auto",
        "Whether the model thinks before it answers. on, off: sets the switch of the chat template, in the rows, for "
        "the run's samples, and as the default of the saved template. auto: the template's own default.",
    )
    rope_scaling: str | None = arg(
        None,
        'Extends the context of a model with rotary embeddings: \'{"rope_type": "yarn", "factor": 4}\', as '
        "transformers' rope_parameters, or short, yarn:4. Types: linear, dynamic, yarn, llama3, longrope. It is saved "
        "in a full model's config.json, and with an adapter's settings.",
    )
    add_tokens: str | None = arg(
        None,
        "New tokens, such as '<call>,<end>': separated by commas, in a file with one in a line and a description after "
        "a tab, or as a JSON object of descriptions. A new token starts at the mean of all tokens, or of those of its "
        "description. Adapters train these tokens as well.",
    )
    max_len: int = arg(1024, "The maximum length of a row in tokens; see --overlong.")
    max_prompt_length: int = arg(512, "The maximum length of the prompt of a preference pair in tokens (dpo).")
    on_bad_row: Literal["auto", "error", "drop"] = arg(
        "auto",
        "auto: a malformed row stops the run, a row with an empty answer is dropped and reported. "
        "error: both stop the run. drop: both are dropped and reported.",
    )
    train_on: str = arg(
        "all_turns",
        "What of a conversation is trained. all_turns: every answer. last_turn: only the last. last_n:2: the last two. "
        "prompt: everything, also the turns of system and user.",
    )
    overlong: Literal["truncate", "drop", "error"] = arg(
        "truncate",
        "What to do with a row longer than --max_len. truncate: remove its oldest turns, then the start of its last "
        "question; answers are never cut, and a row that still does not fit is dropped. drop: leave it out. "
        "error: stop the run.",
    )
    allow_special_tokens_in_content: bool = arg(
        False,
        "Tokenise a special token's text in a row, such as <|im_end|>, as that token. "
        "Off: it stays plain text, so that data cannot forge a turn.",
    )
    cache_dir: str | None = arg(
        None, "The folder of tokenised rows. Default: llm_dojo in the datasets library's cache."
    )
    on_nan: Literal["stop", "skip"] = arg(
        "stop",
        "What to do when the loss or a gradient is NaN or infinite. stop: stop the run and name the step and its rows. "
        "skip: skip the step.",
    )
    row_ledger: bool = arg(
        False,
        "Note each training row's first, last, best and worst loss by file and line in row_ledger.parquet, for "
        "utils.script.ledger. Not for dpo_multi.",
    )
    early_stopping_patience: int | None = arg(
        None,
        "Stop after this many evaluations in a row without improvement; 0 or none: never. "
        "The best weights are kept (--load_best_model_at_end, --metric_for_best_model).",
    )
    early_stopping_threshold: float = arg(
        0.0, "The least improvement of an evaluation that counts (--early_stopping_patience)."
    )
    card_samples: int = arg(
        3,
        "How many questions of the evaluation rows (else of the training rows) the run's README.md shows with answers; "
        "0 for none.",
    )
    doctor: Literal["on", "off"] = arg(
        "on",
        "Check rows, settings, disk and memory before the weights load, and stop on errors (utils/doctor/examine.py).",
    )
    overwrite_output_dir: bool = arg(False, "Train into a folder that already holds a finished run, replacing it.")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = arg(
        "auto", "Mixed precision. auto: bf16 where the device supports it, else fp16 on CUDA, else fp32."
    )
    attn_implementation: Literal["auto", "sdpa", "flash_attention_2", "eager"] = arg(
        "auto",
        "auto: flash attention where GPU, package and model support it, else SDPA or eager.",
    )
    trust_remote_code: bool = arg(False, "Run Python code that comes with the model. Off: it is never run.")

    use_dora: bool = arg(False, "DoRA: also train the magnitude of each adapted weight (arXiv 2402.09353).")
    lora_rank: int = arg(16, "The rank r of the adapters.")
    lora_alpha: float = arg(32, "The scale of the adapters: their output is multiplied by alpha / r.")
    lora_dropout: float = arg(0.0, "Dropout on the adapters' input.")
    lora_target_modules: str | None = arg(
        None,
        "The modules that get an adapter: names separated by commas, or a regular expression of full names as in PEFT. "
        "Default, or all-linear: every linear layer of the language model that PEFT can adapt, except the head and the "
        "routers of a mixture of experts.",
    )
    lora_experts: bool = arg(
        False,
        "Also put adapters on the experts of a mixture of experts, which transformers keeps in one tensor a layer.",
    )
    train_router: bool = arg(
        False,
        "Also train the routers of a mixture of experts: all of their weights, saved beside the adapter.",
    )
    use_rslora: bool = arg(False, "Rank-stabilised LoRA: scale by alpha / sqrt(r) (arXiv 2312.03732).")
    init_lora_weights: Literal["default", "pissa"] = arg(
        "default", "How adapters are initialised. pissa: from the base's principal singular vectors (arXiv 2404.02948)."
    )
    loraplus_lr_ratio: float | None = arg(
        None, "LoRA+: the learning rate of B divided by that of A; 16 in the paper (arXiv 2402.12354)."
    )
    layerwise_lr_decay: float | None = arg(
        None,
        "A learning rate for each layer: from the head down to the embeddings, each has the next one's times this "
        "number, such as 0.9 (arXiv 1801.06146).",
    )
    use_muon: bool = arg(
        False,
        "Train the weight matrices of the layers with Muon, whose updates have the size of AdamW's (arXiv 2502.16982); "
        "embeddings, head, norms and biases with AdamW. Full training in one piece: no adapter, DeepSpeed or FSDP.",
    )
    train_special_tokens: Literal["auto", "on", "off"] = arg(
        "auto",
        "Whether LoRA also trains the embeddings of the template's special tokens. "
        "auto: only of those that the base never trained, recognised by their norms.",
    )

    @property
    def task(self) -> Task:
        """The task of `--task_type`, which reads the fields that `--columns` renames."""
        task = get_task(self.task_type)
        return replace(task, row_type=task.row_type.with_columns(self.column_names)) if self.columns else task

    @property
    def column_names(self) -> dict[str, str]:
        """The value of `--columns`: name in a format → name in the data files."""
        return parse_columns(self.columns)[0]


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
