"""Checks of the DPO recipe's values, which TRL would refuse only once the weights are loaded, or never."""

import math

from utils.runtime.errors import Problem, nearest, refusal

LOSS_TYPES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
READ_SMOOTHING = {"robust", "exo_pair", "aot", "aot_unpaired"}  # the losses that read label_smoothing
_ONLY_REVERSE_KL = {"nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down"}
# dpo_single's loss is its own: what would change TRL's does nothing there
FOR_MULTI = {
    "loss_type": ["sigmoid"],
    "loss_weights": None,
    "label_smoothing": 0.0,
    "ld_alpha": None,
    "f_divergence_type": "reverse_kl",
    "use_weighting": False,
}


def check_dpo(common, train_args) -> list[Problem]:
    """Checks the DPO recipe against itself and the common arguments; returns the problems."""
    # with the recipe of another task, which is refused, its values are not there
    if not common.task_type.startswith("dpo") or not hasattr(train_args, "beta"):
        return []
    problems = _check_lengths(common) + _check_reference(common, train_args) + _check_idle(common, train_args)
    if not 0 < train_args.beta < math.inf:
        problems += refusal(f"--beta {train_args.beta} is not allowed; give a number above 0", "beta")
    # an adapter that was trained with dropout before goes on without
    if (
        common.lora_dropout
        and common.train_mode != "full"
        and train_args.disable_dropout
        and not (common.adapter_name_or_path)
    ):
        problems += refusal(
            f"--lora_dropout {common.lora_dropout} has no effect with --disable_dropout true, which DPO sets so that "
            "policy and reference do not differ by chance; give --disable_dropout false, or no dropout",
            "lora_dropout",
            "disable_dropout",
        )
    if common.task_type == "dpo_single":
        return problems + [
            Problem(
                f"--{name} {getattr(train_args, name)} has no effect in dpo_single, whose loss is written out in "
                "utils/tasks/dpo_single.py; use --task_type dpo_multi, or change preference_loss there",
                flags=(name, "task_type"),
            )
            for name, neutral in FOR_MULTI.items()
            if getattr(train_args, name) != neutral
        ]
    return problems + _check_losses(train_args)


def _check_lengths(common) -> list[Problem]:
    if common.max_prompt_length < common.max_len:
        return []
    return refusal(
        f"--max_prompt_length {common.max_prompt_length} leaves no room for an answer within --max_len "
        f"{common.max_len}; give less",
        "max_prompt_length",
        "max_len",
    )


def _check_reference(common, train_args) -> list[Problem]:
    problems = []
    if train_args.sync_ref_model and common.train_mode != "full":
        problems += refusal(
            f"--sync_ref_model true needs a reference of its own, and under --train_mode {common.train_mode} the "
            "reference is the model with the adapter off; use --train_mode full",
            "sync_ref_model",
            "train_mode",
        )
    if train_args.sync_ref_model and train_args.precompute_ref_log_probs:
        problems += refusal(
            "--sync_ref_model true changes the reference, --precompute_ref_log_probs true fixes it; give one",
            "sync_ref_model",
            "precompute_ref_log_probs",
        )
    if train_args.sync_ref_model and train_args.resume_from_checkpoint:
        problems += refusal(
            f"--resume_from_checkpoint {train_args.resume_from_checkpoint!r} cannot go on with --sync_ref_model true: "
            "the reference that moved with the training is in no checkpoint; train anew in another --output_dir",
            "resume_from_checkpoint",
            "sync_ref_model",
            "output_dir",
        )
    return problems


def _check_idle(common, train_args) -> list[Problem]:
    """Values that only count together with another one."""
    sync = train_args.sync_ref_model
    # flag, value, neutral value, whether it counts here, the flag that would make it count, what is said of that
    together = [
        ("train_on", common.train_on, "all_turns", False, None, "DPO compares the answers after the prompt"),
        ("discopop_tau", train_args.discopop_tau, 0.05, "discopop" in train_args.loss_type,
         "loss_type", "--loss_type discopop"),
        ("f_alpha_divergence_coef", train_args.f_alpha_divergence_coef, 0.5,
         train_args.f_divergence_type == "alpha_divergence",
         "f_divergence_type", "--f_divergence_type alpha_divergence"),
        ("ref_model_sync_steps", train_args.ref_model_sync_steps, 512, sync,
         "sync_ref_model", "--sync_ref_model true"),
        ("ref_model_mixup_alpha", train_args.ref_model_mixup_alpha, 0.6, sync,
         "sync_ref_model", "--sync_ref_model true"),
        ("precompute_ref_batch_size", train_args.precompute_ref_batch_size, None, train_args.precompute_ref_log_probs,
         "precompute_ref_log_probs", "--precompute_ref_log_probs true"),
        ("label_smoothing_factor", train_args.label_smoothing_factor, 0.0, False,
         "label_smoothing", "DPO's own is --label_smoothing"),
    ]  # fmt: skip
    return [
        Problem(
            f"--{name} {value} has no effect here ({needed}); leave it out",
            flags=(name, other) if other else (name,),
        )
        for name, value, neutral, counts, other, needed in together
        if value != neutral and not counts
    ]


def _check_losses(train_args) -> list[Problem]:
    losses, smoothing = train_args.loss_type, train_args.label_smoothing
    problems = [
        Problem(
            f"--loss_type {name!r} is not allowed.{nearest(name, LOSS_TYPES)} Allowed: {', '.join(LOSS_TYPES)}",
            flags=("loss_type",),
        )
        for name in losses
        if name not in LOSS_TYPES
    ]
    if train_args.f_divergence_type not in DIVERGENCES:
        problems += refusal(
            f"--f_divergence_type {train_args.f_divergence_type!r} is not allowed; allowed: {', '.join(DIVERGENCES)}",
            "f_divergence_type",
        )
    elif train_args.f_divergence_type != "reverse_kl":
        problems += [
            Problem(
                f"--loss_type {name} goes only with --f_divergence_type reverse_kl, not {train_args.f_divergence_type}",
                flags=("loss_type", "f_divergence_type"),
            )
            for name in sorted(set(losses) & _ONLY_REVERSE_KL)
        ]
    if smoothing and not READ_SMOOTHING & set(losses):
        problems += refusal(
            f"--label_smoothing {smoothing} has no effect with --loss_type {' '.join(losses)}; it is read by "
            f"{', '.join(sorted(READ_SMOOTHING))}",
            "label_smoothing",
            "loss_type",
        )
    if not 0 <= smoothing < 0.5:
        problems += refusal(
            f"--label_smoothing {smoothing} is not allowed; give at least 0 and below 0.5", "label_smoothing"
        )
    if "exo_pair" in losses and not smoothing:
        problems += refusal(
            "--loss_type exo_pair needs --label_smoothing above 0; 1e-3 in its paper (arXiv 2402.00856)",
            "loss_type",
            "label_smoothing",
        )
    if train_args.ld_alpha is not None and not 0 <= train_args.ld_alpha <= 1:
        problems += refusal(f"--ld_alpha {train_args.ld_alpha} is not allowed; give 0 to 1", "ld_alpha")
    if train_args.use_weighting and {"aot", "aot_unpaired"} & set(losses):
        problems += refusal(
            "--use_weighting true weighs pairs, which --loss_type aot and aot_unpaired tear apart; give one",
            "use_weighting",
            "loss_type",
        )
    return problems
