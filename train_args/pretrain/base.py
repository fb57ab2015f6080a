"""The pretraining recipe: every token of plain text is trained, in packed rows.

The embedded tiny model was made with it; on a larger base it is continued pretraining.
Rows are `{"text": ...}`, or the paragraphs of a .txt file. A special token's text within them stays plain text, unless
`--allow_special_tokens_in_content true` is given; that is the default for the sample data, which contains chats.
"""

from dataclasses import dataclass
from typing import ClassVar

from trl import SFTConfig


@dataclass
class TrainArgument(SFTConfig):
    """Differs from SFTConfig in the fields below."""

    _argument_group_name = "recipe (train_args/pretrain/base.py)"
    task_types: ClassVar[tuple[str, ...]] = ("pretrain",)

    output_dir: str | None = None  # None: output/pretrain-<time>
    num_train_epochs: float = 1  # one pass over the text; more only if there is little
    per_device_train_batch_size: int = 8  # packed rows of max_len tokens per step on each GPU
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-3  # for a small model; 1e-5 to 5e-5 for continued pretraining of a large one
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.03  # a share of all steps
    weight_decay: float = 0.1  # the usual value for training from scratch (GPT-3, Llama)
    adam_beta2: float = 0.95  # from the same papers: a shorter average of squared gradients than 0.999
    max_grad_norm: float = 1.0
    packing: bool = True  # texts share rows of max_len without attention across texts
    padding_free: bool = True
    gradient_checkpointing: bool | None = None  # None: on for models from 1B weights
    eval_strategy: str = "steps"
    eval_steps: float = 0.1
    save_strategy: str = "steps"
    save_steps: float = 0.1
    save_total_limit: int | None = 2
    logging_steps: float = 0.02  # fifty times per run, whatever its length
    logging_first_step: bool = True  # the loss before training
    report_to: str = "tensorboard"
    seed: int = 42
