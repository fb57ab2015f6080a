"""The DPO recipe: what to edit for training on preferences, in both modes.

Every field of TRL's DPOConfig and transformers' TrainingArguments can be set here or given
as a flag. The defaults suit the embedded tiny model; the comments say what a model of
billions of weights wants instead. README.md beside this file explains the modes.
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
    beta: float = 0.1  # how strongly the policy is held to the reference; 0.01 to 0.5 are in use
    loss_type: list[str] = field(default_factory=lambda: ["sigmoid"])  # DPO's own; others for dpo_multi
    num_train_epochs: float = 3  # a large model needs 1 to 2: beyond, it only pushes rejected answers further down
    per_device_train_batch_size: int = 8  # pairs a step on each GPU; each is two rows
    # raise this, not the batch, when memory is short: the result is the same, but for the losses aot and aot_unpaired,
    # which sort the pairs of a batch, and sft, which takes the mean of its tokens
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-3  # for LoRA on a model of 7B: 5e-6 to 5e-5; for full training: 5e-7 to 1e-6
    lr_scheduler_type: str = "cosine"  # ends near zero, so the last steps settle rather than jump
    warmup_steps: float = 0.1  # a share of all steps, larger than for SFT: the first margins are noise
    max_grad_norm: float = 1.0  # one odd batch cannot throw the weights far
    weight_decay: float = 0.0  # the reference already holds the policy back; decay would pull elsewhere
    disable_dropout: bool = True  # policy and reference are compared, and dropout would make them differ by chance
    padding_free: bool = True  # dpo_single: rows end to end, no work on padding, the same loss; dpo_multi pads
    precompute_ref_log_probs: bool = False  # True: the reference speaks once, before training; saves its memory
    gradient_checkpointing: bool | None = None  # None: on from 1B weights, where activations fill the memory
    eval_strategy: str = "steps"
    eval_steps: float = 0.1  # ten times a run
    per_device_eval_batch_size: int = 8
    save_strategy: str = "steps"
    save_steps: float = 0.1  # ten times a run, so that a crash costs a tenth at most
    save_total_limit: int | None = 2  # the newest two
    logging_steps: float = 0.02  # fifty times a run, whatever its length
    logging_first_step: bool = True  # ln 2 = 0.6931, or the reference is not what it should be
    report_to: str = "tensorboard"  # curves in <run>/runs, beside loss.png
    seed: int = 42
