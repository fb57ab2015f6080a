"""What a run takes over from the adapter or the run it starts from, and what it refuses."""

import json

import pytest
import tiny
from conftest import write_rows

import main_train
from utils.args import parse_args

DPO = ["--train_args_path", "train_args/dpo/base.py"]


@pytest.fixture
def tuned(copied):
    """An SFT run's folder, of rank 4 in another format than the default."""
    return copied("--lora_rank", "4", "--lora_alpha", "6", "--template_name", "yi")


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


def test_a_checkpoint_brings_its_format_too(train):
    tuned = train("--template_name", "yi", "--save_strategy", "epoch")
    checkpoint = max(tuned.glob("checkpoint-*"))
    assert parse_args([*DPO, "--adapter_name_or_path", str(checkpoint)])[0].template_name == "yi"


def test_an_adapter_trained_with_dropout_goes_on_without(train, trained, tmp_path):
    tuned = trained("--lora_dropout", "0.1")
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
