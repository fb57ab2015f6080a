"""Settings that have no effect in the current configuration: the rows of the table that hold for every task.

Those of a single task are in its `settings_without_effect`.
"""

from utils.config.recipe import REPLACED_FLAGS
from utils.model.adapter import ADAPTER_FLAGS, FULL, adapter_of
from utils.tasks.no_effect import NoEffect, RunSettings

_WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
_WITHOUT_OPTIONS = ("constant", "constant_with_warmup")
_BY_LENGTH = ("group_by_length", "batch_rebalance")


TABLE = [
    # ------------------------------------------------------------------ what is trained
    NoEffect(("lora_rank", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "loraplus_lr_ratio"),
         lambda c: not adapter_of(c.args).is_adapter, f"--train_mode {FULL} trains every weight, without an adapter"),
    NoEffect(("lora_target_modules", "init_lora_weights", "lora_experts", "train_router", "train_special_tokens"),
         lambda c: not adapter_of(c.args).is_adapter or c.adapter_name_or_path,
         "it is for a new adapter, and this run has none, or continues one"),
    # ------------------------------------------------------------------ rows
    NoEffect(("max_prompt_length",), lambda c: not c.args.task.row_type.has_prompt_limit,
         "only preference pairs have a limit for the prompt alone"),
    NoEffect(("shuffle_buffer",), lambda c: not c.streaming or c.train_sampling_strategy == "sequential",
         "only --streaming true with --train_sampling_strategy random reads rows in groups"),
    NoEffect(("dataset_num_proc",), lambda c: c.streaming and not c.rows_to_evaluate,
         "--streaming true tokenises in the --dataloader_num_workers"),
    NoEffect(("remove_unused_columns",), lambda c: True, "prepared rows hold only what the collators use"),
    NoEffect(("length_column_name",), lambda c: c.train_sampling_strategy not in _BY_LENGTH,
         "only --train_sampling_strategy group_by_length and batch_rebalance use lengths"),
    NoEffect(("dataloader_in_order",), lambda c: not c.dataloader_num_workers, "--dataloader_num_workers is 0"),
    NoEffect(("dataloader_pin_memory",), lambda c: c.use_cpu, "without a GPU there is nothing to copy to"),
    # ------------------------------------------------------------------ length of the run and schedule
    NoEffect(("num_train_epochs",), lambda c: c.max_steps > 0, "--max_steps decides where the run ends"),
    NoEffect(("warmup_steps",), lambda c: c.lr_scheduler_type in _WITHOUT_WARMUP,
         "this --lr_scheduler_type has no warm-up; constant_with_warmup has one"),
    NoEffect(("lr_scheduler_kwargs",), lambda c: c.lr_scheduler_type in _WITHOUT_OPTIONS,
         "this --lr_scheduler_type takes no options"),
    NoEffect(("ignore_data_skip", "restore_callback_states_from_checkpoint"), lambda c: not c.resume_from_checkpoint,
         "the run does not resume from a checkpoint"),
    # ------------------------------------------------------------------ optimizer and loss
    NoEffect(("adam_beta1", "adam_beta2"), lambda c: not c.optimizer_takes("betas"), "this --optim has no betas"),
    NoEffect(("adam_epsilon",), lambda c: not c.optimizer_takes("eps"), "this --optim does not take it"),
    # ------------------------------------------------------------------ evaluation, saving, reports
    NoEffect(("eval_steps",), lambda c: not c.rows_to_evaluate or c.eval_strategy != "steps",
         "--eval_strategy is not steps, or there are no rows to evaluate"),
    NoEffect(("eval_delay",), lambda c: not c.rows_to_evaluate or c.eval_strategy == "no",
         "nothing is evaluated during the training"),
    NoEffect(("per_device_eval_batch_size",),
         lambda c: not c.evaluates and not c.precompute_ref_log_probs, "nothing is evaluated"),
    NoEffect(("bf16_full_eval", "fp16_full_eval"), lambda c: not c.evaluates, "nothing is evaluated"),
    NoEffect(("prediction_loss_only", "eval_accumulation_steps", "eval_do_concat_batches", "batch_eval_metrics",
          "include_for_metrics", "eval_use_gather_object"),
         lambda c: not c.args.task.needs_reference or not c.evaluates,
         "evaluation adds its metrics up and keeps no predictions"),
    NoEffect(("early_stopping_threshold",), lambda c: not c.early_stopping_patience,
         "--early_stopping_patience is not set"),
    NoEffect(("metric_for_best_model",), lambda c: not c.evaluates, "nothing is evaluated"),
    NoEffect(("greater_is_better",), lambda c: not c.evaluates or not c.metric_for_best_model,
         "no evaluation is compared with another (--metric_for_best_model)"),
    NoEffect(("save_steps",), lambda c: c.save_strategy != "steps", "--save_strategy is not steps"),
    NoEffect(("save_total_limit", "save_only_model"), lambda c: c.save_strategy == "no",
         "--save_strategy no writes no checkpoints, except one on Ctrl-C or SIGTERM"),
    NoEffect(("logging_steps",), lambda c: c.logging_strategy != "steps" and c.eval_steps != c.logging_steps,
         "--logging_strategy is not steps"),
    NoEffect(("run_name",), lambda c: set(c.report_to) <= {"tensorboard"}, "no --report_to shows it"),
    NoEffect(("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
         lambda c: "trackio" not in c.report_to, "it is for --report_to trackio"),
    NoEffect(("hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"),
         lambda c: not c.push_to_hub, "--push_to_hub is false"),
    # ------------------------------------------------------------------ memory, devices, processes
    NoEffect(("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
         lambda c: c.activation_checkpointing is False, "--gradient_checkpointing is off"),
    NoEffect(("liger_kernel_config",), lambda c: not c.use_liger_kernel, "--use_liger_kernel is false"),
    NoEffect(("torch_empty_cache_steps",), lambda c: c.use_cpu, "without a GPU there is no cache to empty"),
    NoEffect(("average_tokens_across_devices",), lambda c: c.processes == 1 and c.n_gpu <= 1, "there is one process"),
    NoEffect(("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
         lambda c: c.processes == 1 or c.deepspeed or c.fsdp,
         "DistributedDataParallel is not used: one process, DeepSpeed or FSDP"),
    NoEffect(("ddp_backend", "ddp_timeout"), lambda c: c.processes == 1 and not c.deepspeed, "there is one process"),
    NoEffect(("fsdp_config",), lambda c: not c.fsdp, "--fsdp is not set"),
    NoEffect(("do_train", "do_predict"), lambda c: True, "main_train.py always trains, and nothing else"),
    NoEffect(("do_eval",), lambda c: not c.evaluates, "--eval_strategy and the evaluation rows decide it"),
    *(NoEffect((old,), lambda c: True, f"it is replaced by --{new}{note}")
      for old, (new, note) in REPLACED_FLAGS.items()),
]  # fmt: skip


def without_effect(settings: RunSettings) -> dict[str, str]:
    """The settings that have no effect in this combination: name → why."""
    found: dict[str, str] = {}
    for row in (*TABLE, *settings.args.task.settings_without_effect):
        known = [name for name in row.names if hasattr(settings.args, name) or hasattr(settings.train, name)]
        if known and row.when(settings):
            for name in known:
                found.setdefault(name, row.why)
    adapter = adapter_of(settings.args)
    if adapter.is_adapter:
        for name in ADAPTER_FLAGS:
            if not adapter.takes(name):
                found.setdefault(name, f"--train_mode {settings.args.train_mode} does not have it")
    return found
