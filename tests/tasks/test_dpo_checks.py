"""What is refused of a DPO run and of a start from an adapter, before any weights load."""

import pytest

import main_train
from utils.args import parse_args
from utils.runtime.errors import UserError

DPO = ["--train_args_path", "train_args/dpo/base.py"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--loss_type", "ipoo"], "--loss_type 'ipoo' is not allowed. Did you mean 'ipo'?"),
        (["--beta", "0"], "--beta 0.0 is not allowed"),
        (["--beta", "nan"], "--beta nan is not allowed"),
        (["--beta", "inf"], "--beta inf is not allowed"),
        (["--train_on", "last_turn"], "--train_on last_turn has no effect"),
        (["--discopop_tau", "0.3"], "--loss_type discopop"),
        (["--f_alpha_divergence_coef", "0.9"], "--f_divergence_type alpha_divergence"),
        (["--ref_model_sync_steps", "5"], "--sync_ref_model true"),
        (["--ref_model_mixup_alpha", "0.5"], "--sync_ref_model true"),
        (["--precompute_ref_batch_size", "5"], "--precompute_ref_log_probs true"),
        (["--label_smoothing_factor", "0.1"], "--label_smoothing"),
        (["--use_liger_kernel", "true"], "liger-kernel"),
        (["--label_smoothing", "0.1"], "--label_smoothing 0.1 has no effect here (only --loss_type"),
        (["--loss_type", "robust", "--label_smoothing", "0.5"], "below 0.5"),
        (["--loss_type", "exo_pair"], "needs --label_smoothing above 0"),
        (["--f_divergence_type", "kl"], "allowed: reverse_kl"),
        (
            ["--f_divergence_type", "js_divergence", "--loss_type", "aot"],
            "goes only with --f_divergence_type reverse_kl",
        ),
        (["--loss_type", "sigmoid", "sft", "--loss_weights", "1"], "same length"),
        (["--ld_alpha", "2"], "--ld_alpha 2.0 is not allowed"),
        (["--use_weighting", "true", "--loss_type", "aot"], "--use_weighting true"),
        (["--sync_ref_model", "true"], "--sync_ref_model true needs"),
        (["--sync_ref_model", "true", "--train_mode", "full", "--resume_from_checkpoint", "."], "is in no checkpoint"),
        (["--sync_ref_model", "true", "--precompute_ref_log_probs", "true", "--train_mode", "full"], "give one"),
        (["--max_len", "300", "--max_prompt_length", "300"], "leaves no room"),
        (["--lora_dropout", "0.1"], "has no effect with --disable_dropout true"),
        (["--task_type", "dpo_single", "--loss_type", "ipo"], "has no effect here (the loss of dpo_single is"),
        (["--task_type", "dpo_single", "--label_smoothing", "0.1"], "has no effect here (the loss of dpo_single is"),
        (["--task_type", "sft"], "does not fit the recipe"),
        (["--max_length", "5"], "use --max_len"),
        (["--truncation_mode", "keep_end"], "use --max_len"),
        (["--packing", "true"], "is not a flag"),
    ],
)
def test_refused(refused, tmp_path, flags, said):
    out = refused(main_train.main, *DPO, "--output_dir", str(tmp_path / "run"), *flags)
    assert said in out and not (tmp_path / "run").exists()


def test_all_problems_at_once(refused):
    out = refused(main_train.main, *DPO, "--beta", "-1", "--loss_type", "x", "--max_prompt_length", "2000")
    assert out.startswith("3 errors:")


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--train_on", "last_turn", "--discopop_tau", "0.3", "--label_smoothing_factor", "0.1"],
         ["train_on", "discopop_tau", "label_smoothing_factor"]),
        (["--task_type", "dpo_single", "--loss_type", "ipo", "--ld_alpha", "0.5"], ["loss_type", "ld_alpha"]),
        (["--max_len", "300", "--max_prompt_length", "300"], ["max_prompt_length"]),
    ],
)  # fmt: skip
def test_what_would_do_nothing_is_a_problem_of_the_arguments(flags, names):
    """Told by the parser alone, each by name, before anything is read or loaded."""
    with pytest.raises(UserError) as error:
        parse_args([*DPO, *flags])
    assert sorted(str(problem).split()[0] for problem in error.value.problems) == sorted(f"--{name}" for name in names)


def test_losses_with_weights_are_read():
    _, train_args = parse_args([*DPO, "--loss_type", "sigmoid", "sft", "--loss_weights", "1", "0.2"])
    assert (train_args.loss_type, train_args.loss_weights) == (["sigmoid", "sft"], [1.0, 0.2])
