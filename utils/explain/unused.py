"""Which settings do nothing in a combination of others: one table, a row for each reason."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from utils.config.recipe import REPLACED_FLAGS
from utils.tasks.dpo_checks import FOR_MULTI, READ_SMOOTHING

_WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
_WITHOUT_OPTIONS = ("constant", "constant_with_warmup")
_BY_LENGTH = ("group_by_length", "batch_rebalance")


@dataclass
class Case:
    """A combination of settings, as the table looks at it.

    Attributes:
        args: CommonArgs.
        train: the recipe's TrainArgument.
        processes: how many train together.
        rows_to_evaluate: whether there are validation rows.
    """

    args: Any
    train: Any
    processes: int = 1
    rows_to_evaluate: bool = True

    def __getattr__(self, name: str):
        """A setting, by its name as a flag; the value of an enum, None where the recipe has no such field."""
        holder = self.args if hasattr(self.args, name) else self.train
        value = getattr(holder, name, None)
        return getattr(value, "value", value)

    @property
    def task(self) -> str:
        return self.args.task_type

    @property
    def dpo(self) -> bool:
        return self.task.startswith("dpo")

    @property
    def evaluates(self) -> bool:
        return self.rows_to_evaluate and (self.eval_strategy != "no" or self.eval_on_start)

    def optimizer_takes(self, option: str) -> bool:
        """Whether the optimizer is given an option; true where only the model could tell."""
        from transformers import Trainer

        try:
            return option in Trainer.get_optimizer_cls_and_kwargs(self.train)[1]
        except (ValueError, ImportError):
            return True


@dataclass(frozen=True)
class Idle:
    """A row of the table: settings, when they do nothing, and why."""

    names: tuple[str, ...]
    when: Callable[[Case], Any]
    why: str


TABLE = [
    # ------------------------------------------------------------------ what is trained
    Idle(("lora_rank", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "loraplus_lr_ratio"),
         lambda c: c.train_mode == "full", "--train_mode full trains every weight, without an adapter"),
    Idle(("lora_target_modules", "init_lora_weights", "train_special_tokens"),
         lambda c: c.train_mode == "full" or c.adapter_name_or_path,
         "it is for a new adapter, and this run has none, or goes on from one"),
    # ------------------------------------------------------------------ rows
    Idle(("max_prompt_length",), lambda c: not c.dpo, "only the tasks dpo_multi and dpo_single have pairs"),
    Idle(("template_name", "train_special_tokens"),
         lambda c: c.task == "pretrain", "the task pretrain has plain text, without a chat format"),
    Idle(("train_on",), lambda c: c.task != "sft", "only the task sft trains the answers of a conversation"),
    Idle(("overlong",), lambda c: c.task == "pretrain" and c.packing,
         "packed text of the task pretrain goes on in the next row, so that none is too long"),
    Idle(("padding_free",), lambda c: c.task == "dpo_multi", "TRL's DPO pads its rows; dpo_single need not"),
    Idle(("remove_unused_columns",), lambda c: True, "the rows hold what the collators take, and no more"),
    Idle(("length_column_name",), lambda c: c.train_sampling_strategy not in _BY_LENGTH,
         "only --train_sampling_strategy group_by_length and batch_rebalance look at lengths"),
    Idle(("dataloader_in_order",), lambda c: not c.dataloader_num_workers, "--dataloader_num_workers is 0"),
    Idle(("dataloader_pin_memory",), lambda c: c.use_cpu, "without a GPU there is nothing to copy to"),
    # ------------------------------------------------------------------ length of the run and schedule
    Idle(("num_train_epochs",), lambda c: c.max_steps > 0, "--max_steps says where the run ends"),
    Idle(("warmup_steps",), lambda c: c.lr_scheduler_type in _WITHOUT_WARMUP,
         "this --lr_scheduler_type has no warm-up; constant_with_warmup has one"),
    Idle(("lr_scheduler_kwargs",), lambda c: c.lr_scheduler_type in _WITHOUT_OPTIONS,
         "this --lr_scheduler_type takes no options"),
    Idle(("ignore_data_skip", "restore_callback_states_from_checkpoint"), lambda c: not c.resume_from_checkpoint,
         "the run does not go on from a checkpoint"),
    # ------------------------------------------------------------------ optimizer and loss
    Idle(("adam_beta1", "adam_beta2"), lambda c: not c.optimizer_takes("betas"), "this --optim has no betas"),
    Idle(("adam_epsilon",), lambda c: not c.optimizer_takes("eps"), "this --optim does not take it"),
    Idle(("label_smoothing_factor",), lambda c: c.task in ("sft", "pretrain") and c.loss_type == "dft",
         "--loss_type dft has no smoothing"),
    Idle(("label_smoothing_factor",), lambda c: c.dpo, "DPO's own is --label_smoothing"),
    Idle(tuple(FOR_MULTI), lambda c: c.task == "dpo_single", "the loss of dpo_single is utils/tasks/dpo_single.py's"),
    Idle(("beta",), lambda c: c.task == "dpo_multi" and c.loss_type == ["sft"],
         "--loss_type sft does not look at the reference; it only scales the logged rewards"),
    Idle(("label_smoothing",), lambda c: c.task == "dpo_multi" and not READ_SMOOTHING & set(c.loss_type),
         "this --loss_type has no smoothing"),
    Idle(("discopop_tau",), lambda c: c.dpo and "discopop" not in c.loss_type, "it is for --loss_type discopop"),
    Idle(("f_alpha_divergence_coef",), lambda c: c.dpo and c.f_divergence_type != "alpha_divergence",
         "it is for --f_divergence_type alpha_divergence"),
    Idle(("ref_model_sync_steps", "ref_model_mixup_alpha"), lambda c: c.dpo and not c.sync_ref_model,
         "--sync_ref_model is false"),
    Idle(("precompute_ref_batch_size",), lambda c: c.dpo and not c.precompute_ref_log_probs,
         "--precompute_ref_log_probs is false"),
    # ------------------------------------------------------------------ evaluation, saving, reports
    Idle(("eval_steps",), lambda c: not c.rows_to_evaluate or c.eval_strategy != "steps",
         "nothing is evaluated every so many steps"),
    Idle(("eval_delay",), lambda c: not c.rows_to_evaluate or c.eval_strategy == "no",
         "nothing is evaluated during the training"),
    Idle(("per_device_eval_batch_size",),
         lambda c: not c.evaluates and not c.precompute_ref_log_probs, "nothing is evaluated"),
    Idle(("bf16_full_eval", "fp16_full_eval"), lambda c: not c.evaluates, "nothing is evaluated"),
    Idle(("prediction_loss_only", "eval_accumulation_steps", "eval_do_concat_batches", "batch_eval_metrics",
          "include_for_metrics", "eval_use_gather_object"),
         lambda c: not c.dpo or not c.evaluates, "evaluation adds its figures up and keeps no predictions"),
    Idle(("early_stopping_threshold",), lambda c: not c.early_stopping_patience,
         "--early_stopping_patience is not set"),
    Idle(("metric_for_best_model",), lambda c: not c.evaluates, "nothing is evaluated"),
    Idle(("greater_is_better",), lambda c: not c.evaluates or not c.metric_for_best_model,
         "no evaluation is compared with another (--metric_for_best_model)"),
    Idle(("save_steps",), lambda c: c.save_strategy != "steps", "--save_strategy is not steps"),
    Idle(("save_total_limit", "save_only_model"), lambda c: c.save_strategy == "no",
         "--save_strategy no writes no checkpoints, but for one on Ctrl-C or SIGTERM"),
    Idle(("logging_steps",), lambda c: c.logging_strategy != "steps" and c.eval_steps != c.logging_steps,
         "--logging_strategy is not steps"),
    Idle(("run_name",), lambda c: set(c.report_to) <= {"tensorboard"}, "no --report_to shows it"),
    Idle(("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
         lambda c: "trackio" not in c.report_to, "it is for --report_to trackio"),
    Idle(("hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"),
         lambda c: not c.push_to_hub, "--push_to_hub is false"),
    # ------------------------------------------------------------------ memory, devices, processes
    Idle(("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
         lambda c: c.activation_checkpointing is False, "--gradient_checkpointing is off"),
    Idle(("liger_kernel_config",), lambda c: not c.use_liger_kernel, "--use_liger_kernel is false"),
    Idle(("torch_empty_cache_steps",), lambda c: c.use_cpu, "without a GPU there is no cache to empty"),
    Idle(("average_tokens_across_devices",), lambda c: c.processes == 1 and c.n_gpu <= 1, "there is one process"),
    Idle(("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
         lambda c: c.processes == 1 or c.deepspeed or c.fsdp,
         "DistributedDataParallel has no part in it: one process, DeepSpeed or FSDP"),
    Idle(("ddp_backend", "ddp_timeout"), lambda c: c.processes == 1 and not c.deepspeed, "there is one process"),
    Idle(("fsdp_config",), lambda c: not c.fsdp, "--fsdp is not set"),
    Idle(("do_train", "do_predict"), lambda c: True, "main_train.py trains, and nothing else"),
    Idle(("do_eval",), lambda c: not c.evaluates, "--eval_strategy and rows for it are what counts"),
    *(Idle((old,), lambda c: True, f"it is replaced by --{new}{note}") for old, (new, note) in REPLACED_FLAGS.items()),
]  # fmt: skip


def idle_settings(case: Case) -> dict[str, str]:
    """The settings that do nothing in this combination: name → why."""
    found: dict[str, str] = {}
    for row in TABLE:
        known = [name for name in row.names if hasattr(case.args, name) or hasattr(case.train, name)]
        if known and row.when(case):
            for name in known:
                found.setdefault(name, row.why)
    return found
