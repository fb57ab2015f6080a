"""The command itself: what it leaves, what it refuses, and that it writes nothing when it refuses."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from conftest import ROOT, write_rows

import main_train

ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
FULL = {"config.json", "model.safetensors"}
ALWAYS = {
    "README.md",
    "chat_template.jinja",
    "generation_config.json",
    "loss.png",
    "tokenizer.json",
    "tokenizer_config.json",
    "train.log",
    "train_args.json",
    "trainer_state.json",
}


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_the_command_and_the_files_it_leaves(tiny_models, rows_file, tmp_path):
    folder = tmp_path / "run"
    done = subprocess.run(
        [
            sys.executable,
            "main_train.py",
            "--model_name_or_path",
            tiny_models(),
            "--train_data_path",
            rows_file,
            "--val_size",
            "2",
            "--output_dir",
            str(folder),
            "--num_train_epochs",
            "2",
            "--save_steps",
            "0.5",
            "--cache_dir",
            str(tmp_path / "cache"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    left = files_of(folder)
    checkpoints = {name for name in left if name.startswith("checkpoint-")}
    curves = {name for name in left if name.startswith("runs/")}
    assert left - checkpoints - curves == ALWAYS | ADAPTER
    assert checkpoints and curves
    assert not [name for name in left if name.endswith((".bin", ".pt", ".pth")) and not name.startswith("checkpoint-")]
    for figure in (
        str(folder),
        "training rows    6, dropped 0",
        "at first",
        "evaluation loss",
        f"python -m utils.script.infer --model_path {folder}",
    ):
        assert figure in done.stderr
    assert "%|" in done.stderr  # the progress bar
    assert (folder / "loss.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_what_each_mode_leaves(rendered, train, mode):
    folder = train("--train_mode", mode, "--card_samples", "3")
    assert files_of(folder) == ALWAYS | (FULL if mode == "full" else ADAPTER)


def test_train_args_hold_every_effective_value(train, monkeypatch):
    monkeypatch.setenv("SECRET_OF_MINE", "hunter2-hunter2")
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    folder = train("--lora_rank", "4", "--hub_token", "hf_given_on_the_line", "--save_strategy", "epoch")
    saved = json.loads((folder / "train_args.json").read_text())
    assert saved["common"]["lora_rank"] == 4 and saved["trainer"]["num_train_epochs"] == 2
    assert saved["trainer"]["weight_decay"] == 0.0 and saved["versions"]["torch"]
    everything = "".join(path.read_text(errors="ignore") for path in folder.rglob("*") if path.is_file())
    for secret in ("hunter2", "hf_abcdef", "hf_given"):
        assert secret not in everything


def test_the_log_holds_what_the_terminal_said_and_more(train):
    log = (train() / "train.log").read_text()
    assert "8 of 8 rows" in log and "finished" in log and "step 4: loss" in log


def refuses(refused, tmp_path, tiny_models, rows_file, *flags):
    """The command refuses, and leaves neither a run's folder nor half a cache (whole prepared rows may stay)."""
    before = files_of(tmp_path)
    said = refused(
        main_train.main,
        "--model_name_or_path",
        tiny_models(),
        "--train_data_path",
        rows_file,
        "--output_dir",
        str(tmp_path / "run"),
        "--cache_dir",
        str(tmp_path / "cache"),
        *flags,
    )
    whole = {str(path.parent.relative_to(tmp_path)) for path in (tmp_path / "cache").glob("*/report.json")}
    left = {name for name in files_of(tmp_path) - before if not name.startswith(tuple(whole) or "/")}
    assert not left and not (tmp_path / "run").exists()
    return said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist"),
        (b"", "is empty (0 bytes)"),
        (b"\n\n", "holds no row"),
        (b"\xff\xfe{}", "is not UTF-8"),
        (b'{"instruction": "a", "output": "b"}\n{"instruction": "a"', "is not JSON"),
        (b'{"instruction": "a"}\n', "no field 'output'"),
        (b'{"instruction": null, "output": "b"}\n', "null in 'instruction'"),
        (b'{"instruction": "a", "output": 1}\n', "a number in 'output'"),
        (b'{"instruction": "a", "output": ["b"]}\n', "a list in 'output'"),
        (b'{"instruction": "a", "output": ""}\n', "empty output"),
    ],
)
def test_data_that_cannot_be_used(refused, tmp_path, tiny_models, content, said):
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_bytes(content)
    told = refuses(refused, tmp_path, tiny_models, str(path))
    assert said in told and str(path) in told


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--template_name", "qwem"], "Did you mean 'qwen'"),
        (["--model_name_or_path", "/nowhere/model"], "does not exist"),
        (["--max_len", "3"], "none of the 8 rows keeps a trained token"),
        (["--train_mode", "full", "--use_dora", "true"], "needs an adapter"),
        (["--lora_target_modules", "nothing"], "'nothing'"),
        (["--packing", "true", "--padding_free", "false"], "--padding_free true"),
    ],
)
def test_arguments_that_cannot_be_used(refused, tmp_path, tiny_models, rows_file, flags, said):
    assert said in refuses(refused, tmp_path, tiny_models, rows_file, *flags)


def test_a_broken_model_folder(refused, tmp_path, tiny_models, rows_file):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(tiny_models(), broken)
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(b"half")
    told = refuses(refused, tmp_path, tiny_models, rows_file, "--model_name_or_path", str(broken))
    assert "model.safetensors is cut off or is no safetensors file (4 bytes)" in told and "copy or download" in told
    (broken / "model.safetensors").write_bytes(whole)
    (broken / "tokenizer.json").unlink()
    assert "tokenizer" in refuses(refused, tmp_path, tiny_models, rows_file, "--model_name_or_path", str(broken))
    (broken / "config.json").write_text("{")
    assert "config.json" in refuses(refused, tmp_path, tiny_models, rows_file, "--model_name_or_path", str(broken))


def test_a_model_without_a_pad_token_is_handled(train, tmp_path):
    import copy

    from safetensors.torch import load_file

    tokenizer = copy.deepcopy(tiny.byte_level_tokenizer())
    tokenizer.pad_token = None
    base = tiny.save_tiny_model(tmp_path / "nopad", tokenizer=tokenizer)
    folder = train("--padding_free", "false", model=base)
    assert load_file(folder / "adapter_model.safetensors")


def test_a_finished_run_is_replaced_only_when_told(train, copied, refused, tiny_models, rows_file):
    folder = copied("--save_strategy", "epoch")
    assert list(folder.glob("checkpoint-*"))
    before = (folder / "adapter_model.safetensors").read_bytes()
    said = refused(
        main_train.main,
        "--model_name_or_path",
        tiny_models(),
        "--train_data_path",
        rows_file,
        "--output_dir",
        str(folder),
    )
    assert "--overwrite_output_dir true" in said
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    train("--overwrite_output_dir", "true", "--learning_rate", "1e-2", "--save_strategy", "no")
    assert (folder / "adapter_model.safetensors").read_bytes() != before
    assert not list(folder.glob("checkpoint-*"))


def test_of_a_run_that_is_replaced_no_weights_stay(train):
    """An adapter beside whole weights would be what every loader takes first, and the other way round."""
    names = {"full": "model.safetensors", "lora": "adapter_model.safetensors"}
    for mode in ("lora", "full", "lora"):
        folder = train("--train_mode", mode, "--overwrite_output_dir", "true", "--max_steps", "1")
        assert [path.name for path in folder.glob("*.safetensors")] == [names[mode]]


def test_remote_code_is_not_run_unless_asked(tmp_path, refused, tiny_models, rows_file):
    import shutil

    folder = tmp_path / "remote"
    shutil.copytree(tiny_models(), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "its_own", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    refuses(refused, tmp_path, tiny_models, rows_file, "--model_name_or_path", str(folder))
    assert not (tmp_path / "ran").exists()


def test_resuming_ends_where_an_undisturbed_run_does(train, trained, copied):
    """Half a run, then the rest from its checkpoint: the weights of the whole run, to the bit."""
    flags = ["--precision", "fp32", "--num_train_epochs", "4", "--save_strategy", "epoch", "--save_total_limit", "10"]
    whole, parts = trained(*flags), copied(*flags, output="parts")
    for name in ("train_args.json", "adapter_model.safetensors"):
        (parts / name).unlink()
    import shutil

    for later in ("checkpoint-6", "checkpoint-8"):
        shutil.rmtree(parts / later)
    train(*flags, "--resume_from_checkpoint", "true", output="parts")
    assert (parts / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
def test_help_names_every_flag_and_ctrl_c_leaves_quietly(tmp_path):
    done = subprocess.run(
        [sys.executable, "main_train.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--model_name_or_path" in done.stdout and "--learning_rate" in done.stdout
    assert "--max_length" not in done.stdout
    process = subprocess.Popen(
        [sys.executable, "main_train.py", "--output_dir", str(tmp_path / "run")],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    for line in process.stderr:
        if "train data" in line:
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait() == 130
    assert "Traceback" not in rest


def test_real_formats_train(train, tmp_path):
    data = ",".join(
        [
            write_rows(tmp_path / "a.jsonl", tiny.ROWS[:2]),
            write_rows(
                tmp_path / "b.jsonl",
                [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}],
            ),
            write_rows(
                tmp_path / "c.jsonl",
                [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}],
            ),
        ]
    )
    assert json.loads((train(data=data) / "train_args.json").read_text())["summary"]["rows_trained"] == 4


def test_pretraining_leaves_a_model_that_reloads(train, tmp_path):
    from transformers import AutoModelForCausalLM

    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox.\n\nThe lazy dog.\n")
    folder = train("--train_args_path", "train_args/pretrain/base.py", "--train_mode", "full", data=str(text))
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 0


@pytest.mark.parametrize("flags", [["--packing", "true", "--max_len", "150"], ["--padding_free", "false"]])
def test_packed_and_padded_rows_train(train, flags):
    history = json.loads(
        (train(*flags, "--learning_rate", "1e-2", "--num_train_epochs", "8") / "trainer_state.json").read_text()
    )["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0]


def files_with_content(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".run.lock"]  # goes with the process
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("flags", [[], ["--overwrite_output_dir", "true"]])
def test_files_of_others_are_never_touched(flags, train, refused, tmp_path, tiny_models, rows_file):
    folder = tmp_path / "run"
    (folder / "old").mkdir(parents=True)
    for name in ("README.md", "notes.txt", "old/x", "runs", "model_ema.safetensors"):
        if name in ("README.md", "model_ema.safetensors") and not flags:
            continue  # these are refused without the flag
        (folder / name).write_text("precious")
    train(*flags, "--save_strategy", "epoch")
    left = files_with_content(folder)
    names = ["notes.txt", "old/x", "runs", *(["README.md", "model_ema.safetensors"] if flags else [])]
    assert [left[name] for name in names] == [b"precious"] * len(names)


def test_runs_that_begin_in_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    import types

    from utils.run.save import _claim_folder
    from utils.storage.run_folder import new_folder

    monkeypatch.chdir(tmp_path)
    name = "output/dpo_multi-20260101-000000"
    runs = [types.SimpleNamespace(output_dir=new_folder(name)) for _ in range(3)]
    assert {run.output_dir for run in runs} == {name}
    for run in runs:
        _claim_folder(run, may_exist=False)
    assert [run.output_dir for run in runs] == [name, f"{name}_2", f"{name}_3"]
    again = types.SimpleNamespace(output_dir=name)
    _claim_folder(again, may_exist=True)
    assert again.output_dir == name


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--optim", "galore_adamw"], "--optim galore_adamw cannot be used"),
        (["--lr_scheduler_type", "cosine_with_min_lr"], "--lr_scheduler_type cosine_with_min_lr cannot be used"),
        (["--card_samples", "-1"], "--card_samples -1"),
    ],
)
def test_what_the_trainer_would_refuse_late_costs_no_earlier_run(copied, refused, flags, said, tiny_models, rows_file):
    folder = copied("--max_steps", "1")
    before = files_with_content(folder)
    run = ["--model_name_or_path", tiny_models(), "--train_data_path", rows_file, "--output_dir", str(folder)]
    assert said in refused(main_train.main, *run, "--overwrite_output_dir", "true", *flags)
    assert files_with_content(folder) == before


def test_a_run_that_fails_before_it_trains_leaves_the_earlier_one(train, copied, monkeypatch):
    import utils.tasks.sft

    folder = copied("--max_steps", "1")
    before = files_with_content(folder)

    def fails(*_):
        raise RuntimeError("the trainer")

    monkeypatch.setattr(utils.tasks.sft, "TASK", dataclasses.replace(utils.tasks.sft.TASK, build_trainer=fails))
    with pytest.raises(RuntimeError, match="the trainer"):
        train("--max_steps", "1", "--overwrite_output_dir", "true")
    assert files_with_content(folder) == before


def test_a_run_that_replaces_another_has_a_log_of_its_own(train):
    train("--max_steps", "1", "--seed", "7")
    folder = train("--max_steps", "1", "--overwrite_output_dir", "true", "--seed", "8")
    log = (folder / "train.log").read_text(encoding="utf-8")
    assert '"seed": 8' in log and '"seed": 7' not in log and "finished: " in log


def test_a_folder_with_weights_or_checkpoints_is_refused(refused, tmp_path, tiny_models, rows_file):
    import shutil

    base = tmp_path / "base"
    shutil.copytree(tiny_models(), base)
    common = ["--train_data_path", rows_file]
    said = refused(main_train.main, *common, "--model_name_or_path", str(base), "--output_dir", str(base),
                   "--overwrite_output_dir", "true")  # fmt: skip
    assert "the folder that training starts from" in said
    said = refused(main_train.main, *common, "--model_name_or_path", tiny_models(), "--output_dir", str(base))
    assert "already holds" in said
    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)
    said = refused(
        main_train.main, *common, "--model_name_or_path", tiny_models(), "--output_dir", str(tmp_path / "run")
    )
    assert "already holds checkpoints" in said
    assert "--resume_from_checkpoint true" in said
    (tmp_path / "foreign" / "checkpoint-best").mkdir(parents=True)
    common += ["--model_name_or_path", tiny_models()]
    said = refused(
        main_train.main, *common, "--output_dir", str(tmp_path / "foreign"), "--overwrite_output_dir", "true"
    )
    assert "'checkpoint-best'" in said
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("mine")
    assert "already holds 'config.json'" in refused(main_train.main, *common, "--output_dir", str(tmp_path / "mine"))


def test_a_checkpoint_cut_short_is_passed_over(train, copied):
    """Resuming takes the newest whole one, and ends where the undisturbed run did."""
    flags = ["--precision", "fp32", "--num_train_epochs", "4", "--save_strategy", "epoch", "--save_total_limit", "10"]
    folder = copied(*flags)
    whole = (folder / "adapter_model.safetensors").read_bytes()
    newest = folder / "checkpoint-8" / "adapter_model.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    train(*flags, "--resume_from_checkpoint", "true")
    assert (folder / "adapter_model.safetensors").read_bytes() == whole


def test_a_checkpoint_of_another_kind_is_refused(copied, refused, tiny_models, rows_file):
    folder = copied("--save_strategy", "epoch")
    common = ["--model_name_or_path", tiny_models(), "--train_data_path", rows_file, "--output_dir", str(folder),
              "--resume_from_checkpoint", "true"]  # fmt: skip
    assert "was made with lora_rank 16, now: 4" in refused(main_train.main, *common, "--lora_rank", "4")
    assert "holds an adapter" in refused(main_train.main, *common, "--train_mode", "full")


@pytest.mark.parametrize(
    ("change", "said"), [("weight", "lacks 1 of the weights"), ("layers", "lacks"), ("rows", "rows")]
)
def test_incomplete_models_are_refused(change, said, refused, tmp_path, tiny_models, rows_file):
    import shutil

    from safetensors.torch import load_file, save_file

    base = tmp_path / "incomplete"
    shutil.copytree(tiny_models(), base)
    config = json.loads((base / "config.json").read_text())
    weights = load_file(base / "model.safetensors")
    if change == "weight":
        del weights["model.layers.1.mlp.up_proj.weight"]
    elif change == "layers":
        config |= {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    else:
        config["vocab_size"] = 100
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text(json.dumps(config))
    assert said in refuses(refused, tmp_path, tiny_models, rows_file, "--model_name_or_path", str(base))


def test_a_tokenizer_without_its_file_is_refused(refused, tmp_path, tiny_models, rows_file):
    import shutil

    base = tmp_path / "silent"
    shutil.copytree(tiny_models(), base)
    (base / "tokenizer.json").unlink()
    assert "tokenizer" in refuses(refused, tmp_path, tiny_models, rows_file, "--model_name_or_path", str(base))


def test_pretraining_leaves_the_chat_format_as_it_was(train, tmp_path):
    import copy

    tokenizer = copy.deepcopy(tiny.byte_level_tokenizer())
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    base = tiny.save_tiny_model(tmp_path / "base", tokenizer=tokenizer)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox.\n")
    flags = ["--train_args_path", "train_args/pretrain/base.py", "--template_name", "llama3"]
    folder = train(*flags, model=base, data=str(text))
    assert (folder / "chat_template.jinja").read_text() == tokenizer.chat_template
    assert json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"
