"""The SFT recipe: what to edit for supervised fine-tuning on conversations.

Every field of TRL's SFTConfig and transformers' TrainingArguments can be set here or given
as a flag. The defaults suit the embedded tiny model; the comments give values for models
with billions of weights.
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
    num_train_epochs: float = 20  # a large model needs 1 to 3; the tiny one must see each row often
    per_device_train_batch_size: int = 16  # rows per step on each GPU
    gradient_accumulation_steps: int = 1  # raise this instead of the batch size when memory is short: the same result
    learning_rate: float = 2e-3  # for LoRA on a 7B model: 1e-4 to 2e-4; for full training: 1e-5
    lr_scheduler_type: str = "cosine"  # ends near zero, so that the last steps are small
    warmup_steps: float = 0.03  # a share of all steps: AdamW's estimates are inaccurate at first
    max_grad_norm: float = 1.0  # limits the effect of a single outlier batch
    weight_decay: float = 0.0  # decay would pull the few weights of an adapter back to the base model
    padding_free: bool = True  # rows end to end, without attention across rows: no computation on padding, same loss
    packing: bool = False  # True: several conversations share a row of max_len; fewer steps of equal size
    gradient_checkpointing: bool | None = None  # None: on for models from 1B weights, where activations fill the memory
    eval_strategy: str = "steps"
    eval_steps: float = 0.1  # ten times per run
    per_device_eval_batch_size: int = 16
    save_strategy: str = "steps"
    save_steps: float = 0.1  # ten times per run, so that a crash costs at most a tenth of it
    save_total_limit: int | None = 2  # the newest two; a checkpoint of full training of a 7B model takes some 80 GB
    logging_steps: float = 0.02  # fifty times per run, whatever its length
    logging_first_step: bool = True  # the loss before training
    report_to: str = "tensorboard"  # curves in <run>/runs, in addition to loss.png
    seed: int = 42
