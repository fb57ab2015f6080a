"""A kind of adapter that is added as one row of the table goes through every command."""

import json
from typing import Literal

import pytest
import torch
from modes import logits_of
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import main_train
from utils.args import CommonArgs, parse_args
from utils.model import adapter
from utils.model.adapter import ADAPTERS, Adapter
from utils.model.meta import model_size
from utils.runtime.errors import UserError
from utils.script import doctor, explain, infer, merge_lora, plan_memory, prove


def miss(args, **options):
    """MiSS (arXiv 2409.15371): the change of a weight is one small matrix, repeated along the weight's rows."""
    from peft import MissConfig

    return MissConfig(r=args.lora_rank, miss_dropout=args.lora_dropout, **options)


ROW = Adapter(
    label="MiSS",
    build=miss,
    peft_type="MISS",
    settings={"lora_rank": "r", "lora_dropout": "miss_dropout"},
    options=frozenset({"lora_target_modules"}),
    rate_factor=2.0,
)


@pytest.fixture(autouse=True)
def added(monkeypatch):
    """The row in the table, and the choice of `--train_mode` as it is made from the table on import."""
    monkeypatch.setitem(ADAPTERS, "miss", ROW)
    monkeypatch.setitem(CommonArgs.__annotations__, "train_mode", Literal[tuple(ADAPTERS)])


@pytest.fixture
def miss_run(trained):
    """A run's folder, of an adapter that was trained by `--train_mode miss`."""
    return trained("--train_mode", "miss", "--precision", "fp32", "--learning_rate", "1e-2", "--lora_rank", "4")


def test_it_trains_and_plain_peft_loads_it(miss_run, tiny_models):
    config = json.loads((miss_run / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("MISS", 4)
    base = AutoModelForCausalLM.from_pretrained(tiny_models(), dtype=torch.float32)
    expected = logits_of(base)
    assert (logits_of(PeftModel.from_pretrained(base, miss_run)) - expected).abs().max() > 1e-3
    log = json.loads((miss_run / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0]
    card = (miss_run / "README.md").read_text()
    assert "MiSS trained by" in card and "library_name: peft" in card
    assert "lora_rank 4" in card and "use_dora" not in card


def test_its_trained_weights_are_counted(miss_run, tiny_models):
    args, _ = parse_args(["--model_name_or_path", tiny_models(), "--train_mode", "miss", "--lora_rank", "4"])
    saved = sum(weight.numel() for weight in load_file(miss_run / "adapter_model.safetensors").values())
    assert model_size(args).trained == saved


def test_infer_answers_and_merge_gives_the_same_logits(miss_run, tiny_models, tmp_path, capsys):
    infer.main(["--model_path", str(miss_run), "--prompt", "Hello", "--max_new_tokens", "4", "--do_sample", "false"])
    merge_lora.main(["--model_path", str(miss_run), "--output_dir", str(tmp_path / "merged")])
    base = AutoModelForCausalLM.from_pretrained(tiny_models(), dtype=torch.float32)
    expected = logits_of(PeftModel.from_pretrained(base, miss_run))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-4)


def test_a_run_starts_from_it_in_its_own_kind_alone(miss_run, train, tiny_models):
    start = ["--adapter_name_or_path", str(miss_run), "--max_steps", "1", "--precision", "fp32"]
    again = train("--train_mode", "miss", *start, model=tiny_models(), output="again")
    assert json.loads((again / "adapter_config.json").read_text())["r"] == 4
    with pytest.raises(UserError, match="is a MISS adapter; only LORA ones can be trained on with --train_mode lora"):
        train("--train_mode", "lora", *start, model=tiny_models(), output="lora")
    whole = train("--train_mode", "full", *start, model=tiny_models(), output="full")
    assert (whole / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--use_dora", "true"], "--use_dora True has no effect in --train_mode miss; use --train_mode lora or qlora"),
        (["--init_lora_weights", "pissa"], "pissa has no effect in --train_mode miss; use --train_mode lora, or leave"),
        (["--train_special_tokens", "on"], "--train_special_tokens on has no effect in --train_mode miss"),
        (["--lora_target_modules", "nothing"], "no linear layer to adapt is named 'nothing'"),
    ],
)
def test_what_it_does_not_have_is_refused(flags, message, train):
    with pytest.raises(UserError, match=message):
        train("--train_mode", "miss", *flags)


def test_doctor_explain_and_plan_memory_know_it(tiny_models, rows_file, tmp_path, capsys):
    flags = ["--model_name_or_path", tiny_models(), "--train_data_path", rows_file, "--train_mode", "miss"]
    flags += ["--output_dir", str(tmp_path / "run"), "--max_len", "128"]
    assert doctor.main(flags) == 0
    capsys.readouterr()
    explain.main([*flags, "--json", "true"])
    told = json.loads(capsys.readouterr().out)
    assert told["idle"]["use_rslora"] == told["idle"]["lora_alpha"] == "--train_mode miss does not have it"
    assert "lora_rank" not in told["idle"]
    assert 0 < told["weights"]["trained"] < told["weights"]["all"]
    plan_memory.main([*flags, "--gradient_checkpointing", "false", "--json", "true"])
    modes = [row["mode"] for row in json.loads(capsys.readouterr().out)["settings"]]
    assert modes[0] == "miss" and {"full", "lora", "dora", "qlora"} <= set(modes)


def test_its_mathematics_is_proved(tiny_models, rows_file, capsys):
    """All proofs within the process; a child process has a table without the row."""
    names = ["padding_free", "packed", "accumulation", "adapter_off", "merged"]
    flags = ["--model_name_or_path", tiny_models(), "--train_data_path", rows_file, "--train_mode", "miss"]
    prove.main([*flags, "--only", *names, "--json"])
    proofs = json.loads(capsys.readouterr().out)["proofs"]
    assert {proof["name"]: proof["holds"] for proof in proofs} == dict.fromkeys(names, True)


def test_help_names_every_row(capsys):
    with pytest.raises(SystemExit):
        main_train.main(["--help"])
    assert f"{{{','.join(ADAPTERS)}}}" in capsys.readouterr().out


def test_messages_list_the_rows():
    assert adapter.names_where() == "lora, qlora or miss"
    assert adapter.names_where(lambda row: row.quantised) == "qlora"
