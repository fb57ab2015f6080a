"""What is refused of a DPO run and of a start from an adapter, before any weights load."""

import json

import pytest
import tiny
from conftest import write_rows

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


def test_a_smaller_max_len_brings_a_smaller_prompt():
    assert parse_args([*DPO, "--max_len", "300"])[0].max_prompt_length == 150
    assert parse_args([*DPO, "--max_len", "300", "--max_prompt_length", "200"])[0].max_prompt_length == 200
    assert parse_args([*DPO])[0].max_prompt_length == 512


@pytest.fixture
def tuned(train):
    """An SFT run's folder, of rank 4 in another format than the default."""
    return train("--lora_rank", "4", "--lora_alpha", "6", "--template_name", "yi")


def test_a_start_from_an_adapter_takes_over_its_settings(tuned, tiny_models):
    args, _ = parse_args([*DPO, "--adapter_name_or_path", str(tuned)])
    assert (args.model_name_or_path, args.lora_rank, args.lora_alpha) == (tiny_models(), 4, 6)
    assert args.template_name == "yi"
    # and what is given stays
    args, _ = parse_args([*DPO, "--adapter_name_or_path", str(tuned), "--template_name", "qwen"])
    assert args.template_name == "qwen"


def test_a_start_from_whole_weights_takes_over_the_format(train):
    whole = train("--train_mode", "full", "--template_name", "yi")
    assert parse_args([*DPO, "--model_name_or_path", str(whole)])[0].template_name == "yi"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lora_rank", "8"], "--lora_rank 8 contradicts"),
        (["--use_dora", "true"], "--use_dora True contradicts"),
        (["--init_lora_weights", "pissa"], "is for a new adapter"),
        (["--lora_target_modules", "q_proj"], "is for a new adapter"),
        (["--train_special_tokens", "on"], "is for a new adapter"),
        (["--model_name_or_path", "data/tiny_model"], "was trained on"),
    ],
)
def test_what_contradicts_the_adapter_is_refused(refused, tuned, flags, said):
    assert said in refused(main_train.main, *DPO, "--adapter_name_or_path", str(tuned), *flags)


@pytest.mark.parametrize("place", [".", "checkpoint-1"])
def test_a_base_whose_weights_have_changed_is_refused(refused, train, tmp_path, place):
    base = tiny.save_tiny_model(tmp_path / "base")
    run = train("--max_steps", "1", "--save_strategy", "steps", "--save_steps", "1", model=base)
    start = [*DPO, "--adapter_name_or_path", str(run / place)]
    assert parse_args(start)[0].model_name_or_path == base
    tiny.save_tiny_model(tmp_path / "base", seed=5)
    out = refused(main_train.main, *start, "--output_dir", str(tmp_path / "next"))
    assert f"was trained on {base!r} with weights" in out and "give the base it was trained on" in out


def test_what_is_no_adapter_is_refused(refused, tiny_models, tmp_path, tuned):
    def said(path):
        return refused(main_train.main, *DPO, "--adapter_name_or_path", str(path))

    assert "give it as --model_name_or_path" in said(tiny_models())
    assert "has no adapter_config.json" in said(tmp_path)
    assert "is not a folder" in said(tmp_path / "nowhere")
    assert "give it as --adapter_name_or_path" in refused(main_train.main, "--model_name_or_path", str(tuned))
    (tuned / "adapter_config.json").write_text("{", encoding="utf-8")
    assert "is not JSON" in said(tuned)
    (tuned / "adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING"}), encoding="utf-8")
    assert "only LORA" in said(tuned)
    (tuned / "adapter_model.safetensors").unlink()
    assert "no adapter_model.safetensors" in said(tuned)


def test_the_folder_a_run_starts_from_is_never_written(refused, train):
    tuned = train("--save_strategy", "epoch")
    before = sorted(str(path) for path in tuned.rglob("*"))
    checkpoint = max(tuned.glob("checkpoint-*"))
    for start in (tuned, checkpoint):
        flags = ["--adapter_name_or_path", str(start), "--output_dir", str(tuned), "--overwrite_output_dir", "true"]
        assert "the folder that training starts from" in refused(main_train.main, *DPO, *flags)
    assert sorted(str(path) for path in tuned.rglob("*")) == before


def test_a_checkpoint_brings_its_format_too(train):
    tuned = train("--template_name", "yi", "--save_strategy", "epoch")
    checkpoint = max(tuned.glob("checkpoint-*"))
    assert parse_args([*DPO, "--adapter_name_or_path", str(checkpoint)])[0].template_name == "yi"


def test_an_adapter_trained_with_dropout_goes_on_without(train, tmp_path):
    tuned = train("--lora_dropout", "0.1")
    data = write_rows(tmp_path / "pairs.jsonl", tiny.PAIRS)
    folder = train(*DPO, "--adapter_name_or_path", str(tuned), "--logging_steps", "1", data=data, output="dpo")
    first = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"][0]
    assert first["rewards/chosen"] == 0


def test_a_base_that_was_moved(train, refused, tmp_path):
    from utils.script import infer

    base = tiny.save_tiny_model(tmp_path / "base")
    tuned = train(model=base)
    (tmp_path / "base").rename(tmp_path / "moved")
    out = refused(main_train.main, *DPO, "--adapter_name_or_path", str(tuned))
    assert "which does not exist; give its new path as --model_name_or_path" in out
    data = write_rows(tmp_path / "pairs.jsonl", tiny.PAIRS)
    moved = str(tmp_path / "moved")
    folder = train(*DPO, "--adapter_name_or_path", str(tuned), model=moved, data=data, output="dpo")
    infer.main(["--model_path", str(folder), "--prompt", "Hi", "--max_new_tokens", "2"])


def test_auto_is_the_format_the_adapter_was_saved_with(train, tuned, tmp_path):
    data = write_rows(tmp_path / "pairs.jsonl", tiny.PAIRS)
    folder = train(*DPO, "--adapter_name_or_path", str(tuned), "--template_name", "auto", data=data, output="dpo")
    assert (folder / "chat_template.jinja").read_text() == (tuned / "chat_template.jinja").read_text()


def test_a_damaged_adapter_is_told_before_anything_is_written(refused, tuned, tmp_path):
    (tuned / "adapter_model.safetensors").write_bytes(b"nonsense")
    data = write_rows(tmp_path / "pairs.jsonl", tiny.PAIRS)
    out = refused(
        main_train.main, *DPO, "--adapter_name_or_path", str(tuned), "--train_data_path", data,
        "--output_dir", str(tmp_path / "dpo"),
    )  # fmt: skip
    assert "--adapter_name_or_path" in out and not (tmp_path / "dpo").exists()


def test_sft_goes_on_from_an_adapter_too(train, tuned, rows_file):
    folder = train("--adapter_name_or_path", str(tuned), output="more")
    first = [
        json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"] for run in (tuned, folder)
    ]
    assert first[1][0]["loss"] < first[0][0]["loss"] - 0.01
