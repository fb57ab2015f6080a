"""The SFT recipe: what to edit for supervised fine-tuning on conversations.

Every field of TRL's SFTConfig and transformers' TrainingArguments can be set here or given
as a flag. The defaults suit the embedded tiny model; the comments say what a model of
billions of weights wants instead.
"""

from dataclasses import dataclass
from typing import ClassVar

from trl import SFTConfig


@dataclass
class TrainArgument(SFTConfig):
    """Differs from SFTConfig in the fields below."""

    _argument_group_name = "recipe (train_args/sft/base.py)"
    task_types: ClassVar[tuple[str, ...]] = ("sft",)

    output_dir: str | None = None  # None: output/sft-<time>
    num_train_epochs: float = 20  # a large model needs 1 to 3; this tiny one knows little and must see a row often
    per_device_train_batch_size: int = 16  # rows a step on each GPU
    gradient_accumulation_steps: int = 1  # raise this, not the batch, when memory is short: the result is the same
    learning_rate: float = 2e-3  # for LoRA on a model of 7B: 1e-4 to 2e-4; for full training: 1e-5
    lr_scheduler_type: str = "cosine"  # ends near zero, so the last steps settle rather than jump
    warmup_steps: float = 0.03  # a share of all steps: AdamW's estimates are rough at first
    max_grad_norm: float = 1.0  # one odd batch cannot throw the weights far
    weight_decay: float = 0.0  # adapters are small and short-trained; decay only pulls them back to the base
    padding_free: bool = True  # a step's rows end to end, none sees another: no work on padding, the same loss
    packing: bool = False  # True fills rows of max_len with several conversations: fewer, equal steps
    gradient_checkpointing: bool | None = None  # None: on from 1B weights, where activations fill the memory
    eval_strategy: str = "steps"
    eval_steps: float = 0.1  # ten times a run
    per_device_eval_batch_size: int = 16
    save_strategy: str = "steps"
    save_steps: float = 0.1  # ten times a run, so that a crash costs a tenth at most
    save_total_limit: int | None = 2  # the newest two; a full checkpoint of 7B is some 80 GB
    logging_steps: float = 0.02  # fifty times a run, whatever its length
    logging_first_step: bool = True  # the loss before anything was learned
    report_to: str = "tensorboard"  # curves in <run>/runs, beside loss.png
    seed: int = 42
