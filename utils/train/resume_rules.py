"""The effect of changing each of the recipe's settings on resume: one table.

From transformers' Trainer (5.23): a checkpoint restores the optimizer with its options, the schedule's step and base
rates, the random state, the step, and the trainer's state with its intervals. Other settings are read when used.
"""

from utils.config.recipe import REPLACED_FLAGS

# decide the position in the epoch and the next rows: refused
ORDER = ("seed", "data_seed", "train_sampling_strategy", "dataloader_drop_last", "accelerator_config")
# options of some optimizers only: refused
FIXED = ("optim_args", "optim_target_modules")
# rows of a step: allowed if their product is unchanged
SIZES = ("processes", "per_device_train_batch_size", "gradient_accumulation_steps")
# the schedule is a function of the step, so a new one applies at once
SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps", "num_train_epochs")
# setting → option of the optimizer's groups, which utils/train/resume.py sets after the checkpoint is loaded
OPTIONS = {
    "learning_rate": "initial_lr",
    "weight_decay": "weight_decay",
    "adam_beta1": "betas",
    "adam_beta2": "betas",
    "adam_epsilon": "eps",
}
UPDATED = (*OPTIONS, *SCHEDULE)
# optimizers whose groups hold options only; others keep state there
PLAIN_OPTIMIZERS = (
    "adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "sgd",
)  # fmt: skip
STEP_BY_STEP = {"reduce_lr_on_plateau", "greedy"}  # schedules that depend on earlier evaluations or steps
# read when used: a new value applies, and later steps differ from those of an uninterrupted run, so it is logged
LIVE = (
    "max_grad_norm", "label_smoothing_factor", "average_tokens_across_devices", "neftune_noise_alpha", "tf32",
    "torch_compile", "torch_compile_backend", "torch_compile_mode", "use_liger_kernel", "liger_kernel_config",
    "use_cache", "auto_find_batch_size", "ignore_data_skip", "full_determinism", "use_cpu", "parallelism_config",
    "fsdp", "fsdp_config", "router_aux_loss_coef", "loss_type", "disable_dropout", "loss_weights",
    "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef", "label_smoothing", "beta", "use_weighting",
    "discopop_tau", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps",
)  # fmt: skip
# do not change the training, or are compared in utils/train/resume.py
FREE = (
    "output_dir", "resume_from_checkpoint", "run_name", "project", "report_to", "deepspeed", "optim", "disable_tqdm",
    "do_train", "do_eval", "do_predict", "local_rank", "per_device_eval_batch_size", "bf16", "fp16", "bf16_full_eval",
    "padding_free", "fp16_full_eval", "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "debug",
    "packing", "remove_unused_columns", "label_names", "length_column_name", "trust_remote_code", "model_init_kwargs",
)  # fmt: skip
_FREE_BEGINNINGS = (
    "log", "save_", "eval_", "hub_", "push_to_hub", "trackio", "dataset_", "include_", "skip_memory", "batch_eval",
    "prediction_loss", "dataloader_num", "dataloader_p", "dataloader_m", "dataloader_in_order", "ddp_", "precompute",
    "gradient_checkpointing", "activation_", "torch_empty", "enable_jit", "restore_callback",
)  # fmt: skip


def rule_of(name: str) -> str | None:
    """`order`, `fixed`, `sizes`, `updated` or `live`; None for a setting that does not change the training.

    A field that a recipe adds counts as `live`.
    """
    rules = (("order", ORDER), ("fixed", FIXED), ("sizes", SIZES), ("updated", UPDATED), ("live", LIVE))
    for rule, names in rules:
        if name in names:
            return rule
    return None if name in FREE or name in REPLACED_FLAGS or name.startswith(_FREE_BEGINNINGS) else "live"
