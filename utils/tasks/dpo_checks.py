"""Checks of the DPO recipe's values, which TRL would refuse only after loading the weights, or not at all."""

import math

from utils.model.adapter import adapter_of
from utils.runtime.errors import Problem, nearest, refusal
from utils.tasks.no_effect import NoEffect

LOSS_TYPES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
READ_SMOOTHING = {"robust", "exo_pair", "aot", "aot_unpaired"}  # losses of TRL 1.16 that use label_smoothing
_ONLY_REVERSE_KL = {"nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down"}
NO_EFFECT = (
    NoEffect(("train_on",), lambda s: True, "DPO compares the answers after the prompt",
             refused={"train_on": "all_turns"}),
    NoEffect(("discopop_tau",), lambda s: "discopop" not in s.loss_type, "only --loss_type discopop uses it",
             refused={"discopop_tau": 0.05}, flags=("loss_type",)),
    NoEffect(("f_alpha_divergence_coef",), lambda s: s.f_divergence_type != "alpha_divergence",
             "only --f_divergence_type alpha_divergence uses it",
             refused={"f_alpha_divergence_coef": 0.5}, flags=("f_divergence_type",)),
    NoEffect(("ref_model_sync_steps", "ref_model_mixup_alpha"), lambda s: not s.sync_ref_model,
             "only --sync_ref_model true uses it",
             refused={"ref_model_sync_steps": 512, "ref_model_mixup_alpha": 0.6}, flags=("sync_ref_model",)),
    NoEffect(("precompute_ref_batch_size",), lambda s: not s.precompute_ref_log_probs,
             "only --precompute_ref_log_probs true uses it",
             refused={"precompute_ref_batch_size": None}, flags=("precompute_ref_log_probs",)),
    NoEffect(("label_smoothing_factor",), lambda s: True, "DPO's own is --label_smoothing",
             refused={"label_smoothing_factor": 0.0}, flags=("label_smoothing",)),
)  # fmt: skip


def check_dpo(common, train_args) -> list[Problem]:
    """Checks the recipe and the common arguments for both modes of DPO; returns the problems."""
    problems = _check_lengths(common) + _check_reference(common, train_args)
    if not 0 < train_args.beta < math.inf:
        problems += refusal(f"--beta {train_args.beta} is not allowed; give a number above 0", "beta")
    # a trained adapter may have been trained with dropout; it continues without
    new_adapter = adapter_of(common).is_adapter and not common.adapter_name_or_path
    if common.lora_dropout and new_adapter and train_args.disable_dropout:
        problems += refusal(
            f"--lora_dropout {common.lora_dropout} has no effect with --disable_dropout true, which DPO sets so that "
            "policy and reference do not differ randomly; give --disable_dropout false, or no dropout",
            "lora_dropout",
            "disable_dropout",
        )
    return problems


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
    if train_args.sync_ref_model and adapter_of(common).is_adapter:
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
            f"--resume_from_checkpoint {train_args.resume_from_checkpoint!r} cannot be used with --sync_ref_model "
            "true: the reference that it changes is in no checkpoint; start a new run in another --output_dir",
            "resume_from_checkpoint",
            "sync_ref_model",
            "output_dir",
        )
    return problems


def check_losses(common, train_args) -> list[Problem]:
    """Checks the settings of TRL's losses; returns the problems."""
    problems = _check_loss_types(train_args) + _check_label_smoothing(train_args)
    if train_args.ld_alpha is not None and not 0 <= train_args.ld_alpha <= 1:
        problems += refusal(f"--ld_alpha {train_args.ld_alpha} is not allowed; give 0 to 1", "ld_alpha")
    if train_args.use_weighting and {"aot", "aot_unpaired"} & set(train_args.loss_type):
        problems += refusal(
            "--use_weighting true weighs pairs, which --loss_type aot and aot_unpaired do not keep together: they sort "
            "both sides of a batch; give one",
            "use_weighting",
            "loss_type",
        )
    return problems


def _check_loss_types(train_args) -> list[Problem]:
    """Checks that losses and divergence are known and can be combined."""
    problems = [
        Problem(
            f"--loss_type {name!r} is not allowed.{nearest(name, LOSS_TYPES)} Allowed: {', '.join(LOSS_TYPES)}",
            flags=("loss_type",),
        )
        for name in train_args.loss_type
        if name not in LOSS_TYPES
    ]
    divergence = train_args.f_divergence_type
    if divergence not in DIVERGENCES:
        problems += refusal(
            f"--f_divergence_type {divergence!r} is not allowed; allowed: {', '.join(DIVERGENCES)}", "f_divergence_type"
        )
    elif divergence != "reverse_kl":
        problems += [
            Problem(
                f"--loss_type {name} goes only with --f_divergence_type reverse_kl, not {divergence}",
                flags=("loss_type", "f_divergence_type"),
            )
            for name in sorted(set(train_args.loss_type) & _ONLY_REVERSE_KL)
        ]
    return problems


def _check_label_smoothing(train_args) -> list[Problem]:
    smoothing = train_args.label_smoothing
    problems = []
    if not 0 <= smoothing < 0.5:
        problems += refusal(
            f"--label_smoothing {smoothing} is not allowed; give at least 0 and below 0.5", "label_smoothing"
        )
    if "exo_pair" in train_args.loss_type and not smoothing:
        problems += refusal(
            "--loss_type exo_pair needs --label_smoothing above 0; 1e-3 in its paper (arXiv 2402.00856)",
            "loss_type",
            "label_smoothing",
        )
    return problems
