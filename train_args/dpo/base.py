"""The DPO recipe: what to edit for training on preferences, in both modes.

Every field of TRL's DPOConfig and transformers' TrainingArguments can be set here or given
as a flag. The defaults suit the embedded tiny model; the comments give values for models
with billions of weights. README.md in this folder explains the modes.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from trl import DPOConfig


@dataclass
class TrainArgument(DPOConfig):
    """Differs from DPOConfig in the fields below."""

    _argument_group_name = "recipe (train_args/dpo/base.py)"
    task_types: ClassVar[tuple[str, ...]] = ("dpo_multi", "dpo_single")  # the first is the default

    output_dir: str | None = None  # None: output/dpo_multi-<time>
    beta: float = 0.1  # how strongly the policy is kept close to the reference; 0.01 to 0.5 are common
    loss_type: list[str] = field(default_factory=lambda: ["sigmoid"])  # the DPO paper's; others only with dpo_multi
    num_train_epochs: float = 3  # a large model needs 1 to 2; more only lowers the rejected answers further
    per_device_train_batch_size: int = 8  # pairs per step on each GPU; each is two rows
    # raise this instead of the batch size when memory is short: the result is the same, except for the losses aot and
    # aot_unpaired, which sort the pairs of a batch, and sft, which averages over the tokens of a batch
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-3  # for LoRA on a 7B model: 5e-6 to 5e-5; for full training: 5e-7 to 1e-6
    lr_scheduler_type: str = "cosine"  # ends near zero, so that the last steps are small
    warmup_steps: float = 0.1  # a share of all steps; larger than for SFT, as the first margins are noisy
    max_grad_norm: float = 1.0  # limits the effect of a single outlier batch
    weight_decay: float = 0.0  # the reference already regularises the policy
    disable_dropout: bool = True  # policy and reference are compared; dropout would add random differences
    padding_free: bool = True  # dpo_single: rows end to end, no computation on padding, the same loss; dpo_multi pads
    precompute_ref_log_probs: bool = False  # True: computed once before training; saves the memory of the reference
    gradient_checkpointing: bool | None = None  # None: on for models from 1B weights, where activations fill the memory
    eval_strategy: str = "steps"
    eval_steps: float = 0.1  # ten times per run
    per_device_eval_batch_size: int = 8
    save_strategy: str = "steps"
    save_steps: float = 0.1  # ten times per run, so that a crash costs at most a tenth of it
    save_total_limit: int | None = 2  # the newest two
    logging_steps: float = 0.02  # fifty times per run, whatever its length
    logging_first_step: bool = True  # must be ln 2 = 0.6931; otherwise policy and reference differ at the start
    report_to: str = "tensorboard"  # curves in <run>/runs, in addition to loss.png
    seed: int = 42
