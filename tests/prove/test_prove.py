"""The proofs hold on a sound project, and each is seen to fail on the fault it is there for."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import peft
import psutil
import pytest
import tiny
import torch
from conftest import ROOT, write_rows
from transformers import Trainer

import utils.data.collate
import utils.tasks.sft
from utils.prove.arguments import make_subject
from utils.prove.figures import DoesNotApply, Measure, ProofFailed, Verdict, same_logits, worst
from utils.prove.registry import PROOFS
from utils.prove.run_checks import kill_tree, ranks, resumed, run_training
from utils.runtime.errors import UserError
from utils.script import prove

IN_PROCESS = ["padding_free", "packed", "accumulation", "adapter_off", "merged", "stops"]


@pytest.fixture
def flags(tiny_models, rows_file, tmp_path):
    return [
        "--model_name_or_path",
        tiny_models(),
        "--train_data_path",
        rows_file,
        "--cache_dir",
        str(tmp_path / "kept"),
    ]


@pytest.fixture
def proved(flags, capsys):
    """Runs the command; returns what each proof came to, by name, and the exit code."""

    def run(*more, only=IN_PROCESS):
        code = 0
        try:
            prove.main([*flags, *more, "--only", *only, "--json"])
        except SystemExit as stop:
            code = stop.code
        told = json.loads(capsys.readouterr().out)
        assert (code == 0) == told["holds"]
        return {proof["name"]: proof for proof in told["proofs"]}, code

    return run


def holding(proofs: dict) -> dict:
    return {name: proof["holds"] for name, proof in proofs.items()}


# ---------------------------------------------------------------------- what holds
def test_all_hold_on_a_sound_model_and_nothing_is_left(proved, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    proofs, code = proved("--lora_dropout", "0.3", "--output_dir", str(tmp_path / "run"), only=IN_PROCESS[:5])
    assert code == 0 and holding(proofs) == dict.fromkeys(IN_PROCESS[:5], True)
    loss, norm, one = proofs["padding_free"]["measures"]
    assert loss["what"] == "loss" and loss["expected"] == pytest.approx(loss["found"], rel=1e-5)
    assert norm["expected"] > 0 and one["what"].startswith("gradient of ")
    assert not (tmp_path / "run").exists() and not any((tmp_path / "scratch").glob("llm_dojo-prove-*"))


def test_full_training_has_no_adapter_to_prove_and_learns_to_stop(proved):
    proofs, code = proved("--train_mode", "full")
    assert code == 0
    assert holding(proofs) == dict.fromkeys(IN_PROCESS, True) | {"adapter_off": None, "merged": None}
    assert "no adapter" in proofs["merged"]["does_not_apply"] and proofs["merged"]["measures"] == []
    assert proofs["stops"]["measures"][0]["found"] == 4


@pytest.mark.parametrize("how", [["--task_type", "dpo_single"], ["--task_type", "dpo_multi", "--train_mode", "full"]])
def test_preferences(proved, tmp_path, how):
    pairs = write_rows(tmp_path / "pairs.jsonl", tiny.PAIRS)
    recipe = ["--train_args_path", "train_args/dpo/base.py", "--train_data_path", pairs]
    proofs, code = proved(*recipe, *how)
    single, lora = "dpo_single" in how, "full" not in how
    expected = {"padding_free": single or None, "packed": None, "accumulation": True, "stops": None}
    assert code == 0 and holding(proofs) == expected | dict.fromkeys(("adapter_off", "merged"), lora or None)
    loss = proofs["accumulation"]["measures"][0]["expected"]
    assert abs(loss - 0.693147) > 1e-4  # at the start it is ln 2, whatever the rows


@pytest.mark.parametrize("how", [["--train_mode", "qlora"], ["--init_lora_weights", "pissa"], ["--use_dora", "true"]])
def test_every_kind_of_adapter_is_merged(proved, how):
    proofs, code = proved(*how, only=["adapter_off", "merged", "accumulation"])
    pissa = "pissa" in how
    assert code == 0
    assert holding(proofs) == {"accumulation": True, "adapter_off": None if pissa else True, "merged": True}


def test_plain_text_is_packed_and_never_split(proved, tmp_path):
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": text * n} for n, text in enumerate(tiny.TEXT[:4], 1)])
    recipe = ["--train_args_path", "train_args/pretrain/base.py", "--train_data_path", texts, "--max_len", "400"]
    proofs, code = proved(*recipe, only=["padding_free", "packed", "stops"])
    assert code == 0 and holding(proofs) == {"padding_free": True, "packed": True, "stops": None}


# ---------------------------------------------------------------------- planted faults
def test_positions_that_do_not_start_again_are_seen(proved, monkeypatch):
    sound = utils.data.collate._with_sources

    def planted(collate):
        def forgetful(rows):
            batch = sound(collate)(rows)
            if "position_ids" in batch:
                batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
            return batch

        return forgetful

    monkeypatch.setattr(utils.data.collate, "_with_sources", planted)
    proofs, code = proved(only=["padding_free", "packed", "accumulation"])
    # the probe sees it too, and a run would pad its rows
    assert holding(proofs) == {"padding_free": None, "packed": None, "accumulation": True}
    assert "see each other" in proofs["padding_free"]["does_not_apply"]


def test_a_mean_of_means_is_seen(proved, monkeypatch):
    monkeypatch.setattr(Trainer, "_get_num_items_in_batch", lambda *_: None)
    proofs, code = proved(only=["padding_free", "packed", "accumulation"])
    assert code == 1 and holding(proofs) == {"padding_free": True, "packed": True, "accumulation": False}


def test_a_merge_with_the_wrong_scale_is_seen(proved, monkeypatch):
    sound = peft.tuners.lora.layer.Linear.get_delta_weight
    monkeypatch.setattr(
        peft.tuners.lora.layer.Linear, "get_delta_weight", lambda self, adapter: 1.1 * sound(self, adapter)
    )
    proofs, code = proved(only=["adapter_off", "merged"])
    assert code == 1 and holding(proofs) == {"adapter_off": True, "merged": False}


def test_an_adapter_that_leaks_is_seen(proved, monkeypatch):
    monkeypatch.setattr(peft.PeftModel, "disable_adapter", lambda self: contextlib.nullcontext())
    assert holding(proved(only=["adapter_off"])[0]) == {"adapter_off": False}


def test_a_base_that_training_changes_is_seen(proved, monkeypatch):
    sound = utils.tasks.sft.make_trainer

    def planted(*args):
        trainer = sound(*args)
        base = next(weight for name, weight in trainer.model.named_parameters() if name.endswith("base_layer.weight"))
        base.data.mul_(1 + 1e-4)
        return trainer

    monkeypatch.setattr(utils.tasks.sft, "make_trainer", planted)
    assert holding(proved(only=["adapter_off"])[0]) == {"adapter_off": False}


def test_an_adapter_that_does_nothing_proves_nothing(proved, monkeypatch):
    monkeypatch.setattr("utils.prove.subject.Subject.perturb_weights", lambda *_: None)
    assert holding(proved(only=["adapter_off"])[0]) == {"adapter_off": False}


def test_answers_that_were_never_taught_to_stop_are_seen(proved, monkeypatch):
    sound = utils.tasks.sft.encode_within

    def planted(*args, **options):
        rows = sound(*args, **options)
        for row in rows:
            last = max(place for place, label in enumerate(row["labels"]) if label != -100)
            row["labels"][last] = -100
        return rows

    monkeypatch.setattr(utils.tasks.sft, "encode_within", planted)
    proofs, code = proved("--train_mode", "full", only=["padding_free", "stops"])
    assert code == 1 and holding(proofs) == {"padding_free": True, "stops": False}


def test_a_proof_that_breaks_does_not_end_the_others(proved, monkeypatch):
    def broken(subject):
        raise ValueError("no such\nform")

    monkeypatch.setattr("utils.prove.batch_checks._pack", broken)
    proofs, code = proved(only=["packed", "accumulation"])
    assert code == 1 and holding(proofs) == {"packed": False, "accumulation": True}
    assert proofs["packed"]["failure"] == "ValueError: no such form"


# ---------------------------------------------------------------------- runs of their own
FAULTS = {
    # the checkpoint's moments of Adam are not read
    "optimizer": "transformers.Trainer._load_optimizer_and_scheduler = lambda *_: None",
    # an epoch begins anew where it was broken off
    "order": "transformers.trainer.skip_first_batches = lambda batches, *_: batches",
    # every process trains on the first one's share
    "shares": """
shards = accelerate.data_loader.BatchSamplerShard
sound = shards.__iter__
def same(self):
    self.process_index = 0
    return sound(self)
shards.__iter__ = same
""",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A subject whose undisturbed run serves all the tests of this kind."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_rows(folder / "rows.jsonl", tiny.ROWS)
    flags = ["--model_name_or_path", tiny.save_tiny_model(folder / "base"), "--train_data_path", data]
    return make_subject([*flags, "--cache_dir", str(folder / "kept"), "--learning_rate", "1e-2"], 8, folder)


@pytest.fixture
def try_one(runs, tmp_path, monkeypatch):
    """Tries a proof, with a fault planted in the processes it starts."""

    def run(function, fault=""):
        for name in ("resumed", "ranks"):
            shutil.rmtree(runs.scratch / name, ignore_errors=True)
        planted = "import sys\nif 'torch.distributed.run' not in sys.orig_argv:\n    import accelerate, transformers\n"
        planted += "".join(f"    {line}\n" for line in FAULTS.get(fault, "").splitlines())
        (tmp_path / "sitecustomize.py").write_text(planted, encoding="utf-8")
        if fault:
            monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return Verdict(function(runs))

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "fault"), [(resumed, ""), (resumed, "optimizer"), (resumed, "order"), (ranks, ""), (ranks, "shares")]
)
def test_runs_of_their_own(try_one, function, fault):
    verdict = try_one(function, fault)
    assert verdict.holds is not bool(fault)
    assert [measure.what.split(" of ")[0] for measure in verdict.measures][0] == "loss"


@pytest.mark.slow
def test_a_run_that_fails_says_why(runs):
    with pytest.raises(ProofFailed, match="exit code 2: error: --lora_rank 0 is not allowed"):
        run_training(runs, "wrong", ["--lora_rank", "0"])


def ends(process: psutil.Process) -> bool:
    """Whether a killed process ends: the kernel sends the signal at once and ends it a little later."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for _ in range(200):
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
            time.sleep(0.05)
        return False
    return True


@pytest.mark.slow
def test_a_command_that_is_stopped_takes_its_runs_and_folders_with_it(flags, tmp_path):
    # rows are prepared here, so that the only processes are the runs
    make_subject(flags, 4, tmp_path)
    words = [sys.executable, "-m", "utils.script.prove", *flags, "--only", "ranks"]
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as command:
        children = []
        while not children and command.poll() is None:
            children = psutil.Process(command.pid).children(recursive=True)
            time.sleep(0.1)
        command.send_signal(signal.SIGTERM)
        command.wait(60)
    assert command.returncode == 143 and children
    assert all(ends(child) for child in children)
    assert not list(tmp_path.glob("llm_dojo-prove-*"))


WORKER = "import subprocess, sys; subprocess.run(['sleep', '100'], start_new_session=True)"


def test_workers_in_sessions_of_their_own_end_too():
    with subprocess.Popen([sys.executable, "-c", WORKER]) as launcher:
        while not (workers := psutil.Process(launcher.pid).children()):
            time.sleep(0.05)
        kill_tree(launcher.pid)
    assert launcher.returncode == -signal.SIGKILL
    assert ends(workers[0])


@pytest.mark.parametrize(
    ("setting", "said"),
    [({"attention_dropout": 0.1}, r"attention_dropout 0\.1"), ({"output_router_logits": True}, "within a process")],
)
def test_ranks_do_not_apply_where_processes_differ_by_themselves(tiny_models, rows_file, tmp_path, setting, said):
    flags = ["--model_name_or_path", tiny_models(**setting), "--train_data_path", rows_file]
    with pytest.raises(DoesNotApply, match=said):
        ranks(make_subject([*flags, "--cache_dir", str(tmp_path)], 4, tmp_path))


# ---------------------------------------------------------------------- the command
def test_lines(flags, capsys):
    prove.main([*flags, "--only", "padding_free", "--rows", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("✓ padding_free") and lines[-1] == "1 hold, 0 do not, 0 do not apply"
    assert " and " in lines[1] and lines[1].endswith("tolerance 1e-05") and lines[1].startswith("    loss: ")


def test_the_list_names_every_proof_and_its_tolerance(capsys):
    prove.main(["--list"])
    said = capsys.readouterr().out
    assert all(f"{name}: {proof.says}" in said and proof.tolerance in said for name, proof in PROOFS.items())


def test_bad_input_is_told_at_once(flags, refused, tmp_path):
    said = refused(prove.main, *flags, "--only", "packd", "stops", "--rows", "1")
    assert "'packd' is not a proof. Did you mean 'packed'?" in said and "--rows 1 is not allowed" in said
    said = refused(prove.main, *flags, "--max_lenn", "3", "--lora_rank", "0")
    assert "--max_lenn is not a flag" in said and "--lora_rank 0" in said
    one = write_rows(tmp_path / "one.jsonl", tiny.ROWS[:1])
    assert "the proofs need two at least" in refused(prove.main, *flags, "--train_data_path", one)


def test_a_launcher_is_refused(flags, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="start it with plain python"):
        prove.main(flags)


def test_what_is_no_number_never_holds():
    nan = float("nan")
    assert not Measure("loss", 1.0, nan, nan, 1e-5).holds
    close = Measure("loss", 1.0, 1.0, 0.0, 1e-5)
    assert worst([close, Measure("loss", 1.0, nan, nan, 1e-5), close]).found != worst([close]).found
    broken = [torch.tensor([[1.0, nan]]), torch.tensor([[1.0, 2.0]])]
    assert not same_logits("", broken, broken, 1.0).holds
    assert Verdict().holds is False and Verdict(why_not="…").holds is None


def test_rows_of_all_lengths_are_chosen(tiny_models, tmp_path):
    rows = [{"instruction": "Hi", "output": "x " * n} for n in (5, 90, 3, 40, 3, 3, 20, 3)]
    flags = ["--model_name_or_path", tiny_models(), "--train_data_path", write_rows(tmp_path / "r.jsonl", rows)]
    subject = make_subject([*flags, "--cache_dir", str(tmp_path / "kept")], 3, tmp_path)
    lengths = [len(row["input_ids"]) for row in subject.rows]
    assert len(lengths) == 3 and max(lengths) > 90 > min(lengths)
    assert subject.raw_rows == [rows[line - 1] for _, line in map(prove_place, subject.rows)]
    assert Path(subject.rows_file(2)).read_text(encoding="utf-8").count("\n") == 2


def prove_place(row):
    return divmod(row["source"][0], 1 << 40)
