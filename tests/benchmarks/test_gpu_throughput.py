"""benchmarks/gpu_throughput.py: its own logic, on the CPU; the GPU's figures are measured, not asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from conftest import ROOT

from benchmarks import gpu_throughput, timed_case
from benchmarks.gpu_throughput import key, main, parse, table
from benchmarks.model_flops import SHAPES, count, flops, peak
from benchmarks.peers import Program, Work
from benchmarks.random_work import Rows, load_tokenizer, make_rows
from benchmarks.tables import table_in
from benchmarks.timed_case import judge, run_case, why, words_for

CASE = {"shape": "tiny", "mode": "lora", "setting": "best", "program": "LLM-Dojo", "repeat": 0}
HAS = {
    "card": {"name": "CPU", "memory_gb": None, "driver": None, "cuda": None},
    "versions": {"torch": "2"},
    "flash_attention": False,
    "liger": False,
}
NOTED = {
    "ends": [10.0, 12.0, 13.0, 14.5], "tokens": [100, 100, 300, 200], "peak_bytes": 5e9, "attention": "sdpa",
    "gradient_checkpointing": False, "optimizer": "adamw_torch_fused",
}  # fmt: skip


# ------------------------------------------------------------------ arithmetic
@pytest.mark.parametrize(
    ("shape", "weights", "in_the_layers"),
    # of the models' cards on the hub, in billions: all, and without embeddings
    [("0.5b", 0.49, 0.36), ("1.5b", 1.54, 1.31), ("7b", 7.61, 6.53)],
)
def test_the_shapes_have_the_published_numbers_of_weights(shape, weights, in_the_layers):
    counts = count(shape, rank=8)
    lookup = 0 if SHAPES[shape].get("tie_word_embeddings", True) else counts.head
    assert (counts.body + counts.head + lookup) / 1e9 == pytest.approx(weights, abs=0.006)
    assert counts.body / 1e9 == pytest.approx(in_the_layers, abs=0.006)


def test_the_adapters_weights_are_what_peft_makes():
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from benchmarks.model_flops import config_of
    from benchmarks.peers import LINEAR

    model = get_peft_model(AutoModelForCausalLM.from_config(config_of("tiny")), LoraConfig(r=8, target_modules=LINEAR))
    assert count("tiny", rank=8).adapter == model.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_operations_are_those_that_torch_counts(mode):
    """torch counts matrix products as they run, but attention without regard to its mask: twice the causal half."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    from benchmarks.model_flops import config_of

    length = 64
    config = config_of("tiny", attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(config)
    model.requires_grad_(mode == "full")
    embedded = torch.randn(1, length, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=embedded).logits.sum().backward()
    counts = count("tiny", rank=0)
    ours = flops(counts, mode, length, length, 2 * length**2)
    # norms and biases are weights, too, though no matrix products
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_adapters_and_unlabelled_tokens_in_the_count():
    counts = count("tiny", rank=8)
    assert flops(counts, "lora", 10, 4, 0) == 4 * (counts.body * 10 + counts.head * 4) + 6 * counts.adapter * 10
    assert flops(counts, "full", 10, 4, 0) == 6 * (counts.body * 10 + counts.head * 4)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12), ("NVIDIA L4", 121e12), ("NVIDIA L40", None), ("Tesla T4", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("CPU", None),
    ],
)  # fmt: skip
def test_the_peak_of_a_card_by_its_name(name, found):
    assert peak(name) == found


# ------------------------------------------------------------------ rows
def test_rows_are_as_long_as_said_and_the_same_for_a_seed(tmp_path):
    sums = make_rows(tmp_path / "a", 60, 512, seed=1)
    assert make_rows(tmp_path / "b", 60, 512, seed=1) == sums != make_rows(tmp_path / "c", 60, 512, seed=2)
    tokenizer = load_tokenizer()
    lines = (tmp_path / "a" / "trl" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    lengths = []
    for row in map(json.loads, lines):
        text = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
        lengths.append(len(tokenizer(text)["input_ids"]))
    assert max(lengths) <= 512 and 90 < sum(lengths) / 60 < 170
    assert (len(lengths), sum(lengths), sum(length**2 for length in lengths)) == (60, sums.tokens, sums.squares)
    assert 0.5 < sums.labelled / sums.tokens < 0.8


# ------------------------------------------------------------------ one case
@pytest.mark.parametrize("setting", ["best", "default"])
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_both_programs_understand_their_words(mode, setting, tmp_path, monkeypatch):
    from trl.scripts.sft import make_parser

    from utils.args import parse_args

    monkeypatch.chdir(ROOT)
    tiny.save_tiny_model(tmp_path / "base")
    make_rows(tmp_path, 2, 256, seed=0)
    best, case = setting == "best", {**CASE, "mode": mode, "setting": setting}
    work = Work(tmp_path / "base", tmp_path, 4, best, max_steps=3, max_len=256)

    def words(name, *more):
        return [*words_for(Program(name, Path("python")), case, work, tmp_path / "out", HAS, False), *more]

    common, ours = parse_args(words("LLM-Dojo")[1:])
    _, theirs, model, _ = make_parser().parse_args_into_dataclasses(words("TRL")[2:])
    for name in ("learning_rate", "max_steps", "per_device_train_batch_size", "seed", "packing", "optim"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert (common.train_mode, model.use_peft) == (mode, mode == "lora")
    assert model.dtype == {"lora": "bfloat16", "full": "float32"}[mode]
    assert (ours.gradient_checkpointing, theirs.gradient_checkpointing) == ((False, False) if best else (None, True))
    assert ours.logging_steps == theirs.logging_steps == 1 and ours.packing == best
    # the second try, after memory ran out: the later word counts
    again = ("--gradient_checkpointing", "true")
    assert parse_args(words("LLM-Dojo", *again)[1:])[1].gradient_checkpointing is True
    assert make_parser().parse_args_into_dataclasses(words("TRL", *again)[2:])[1].gradient_checkpointing is True


def test_faster_kernels_are_asked_for_where_they_are():
    work, has = Work(Path("base"), Path("data"), packing=True), {**HAS, "flash_attention": True, "liger": True}
    for name in ("LLM-Dojo", "TRL"):
        program = Program(name, Path("python"))
        best, plain = (
            " ".join(words_for(program, {**CASE, "setting": setting}, work, Path("out"), has, setting == "best"))
            for setting in ("best", "default")
        )
        assert "--use_liger_kernel true" in best and "--torch_compile true" in best
        assert ("--attn_implementation flash_attention_2" in best) == (name == "TRL")  # ours finds it by itself
        assert not {"--use_liger_kernel", "--attn_implementation", "--torch_compile"} & set(plain.split())


def failing(tmp_path, code, monkeypatch, minutes=1.0, fall_back=False):
    """Runs a case whose program is a line of Python; returns what is found, and how often it ran."""
    (tmp_path / "program.py").write_text(code)
    commands, run = [], subprocess.run
    monkeypatch.setattr(timed_case.subprocess, "run", lambda command, **options: commands.append(command) or run(
        [command[0], str(tmp_path / "program.py"), *command[3:]], **options))  # fmt: skip
    program = Program("LLM-Dojo", Path(sys.executable))
    return run_case(program, lambda out: ["main_train.py", str(out)], tmp_path, minutes, fall_back), commands


OOM = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (f"raise SystemExit('{OOM}')", "out of memory"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed, as a machine without memory left does"),
        ("raise SystemExit('error: --max_len 0')", "error: --max_len 0"),
        ("pass", "exit code 0, and no word"),
    ],
)
def test_a_run_that_fails_says_why(code, reason, tmp_path, monkeypatch):
    found, commands = failing(tmp_path, code, monkeypatch)
    assert found == {"failed": reason} and len(commands) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["program.py"]  # nothing is left behind


def test_a_run_that_hangs_is_given_up(tmp_path, monkeypatch):
    found, _ = failing(tmp_path, "import time; time.sleep(60)", monkeypatch, minutes=0.01)
    assert found == {"failed": "not done after 0.01 minutes"}


def test_what_does_not_fit_is_tried_again_with_checkpointing(tmp_path, monkeypatch):
    code = f"""
import json, sys
if sys.argv[-2:] != ["--gradient_checkpointing", "true"]:
    sys.exit("{OOM}")
json.dump({{"ends": []}}, open(sys.argv[1], "w"))
"""
    found, commands = failing(tmp_path, code, monkeypatch, fall_back=True)
    assert found == {"ends": []} and len(commands) == 2


def test_what_a_program_said_of_its_failure():
    assert why(1, "RuntimeError: CUBLAS_STATUS_ALLOC_FAILED when calling") == "out of memory"
    assert why(1, "Traceback\nValueError: no\n\n  0%|") == "ValueError: no"


def test_the_first_steps_do_not_count():
    rows = Rows(count=2, tokens=10, labelled=5, squares=60)
    found = judge(NOTED, CASE, rows, "NVIDIA H100 80GB HBM3", warm_up=2)
    assert found["tokens_per_second"] == 500 / 2.5 and found["peak_gb"] == 5
    per_token = flops(count("tiny", 8), "lora", 10, 5, 60) / 10
    assert found["flops_per_token"] == round(per_token)
    assert found["share_of_peak"] == round(per_token * 200 / 989e12, 4)
    assert found["seconds_after_the_first_step"] == [2, 1, 1.5]
    assert judge(NOTED, CASE, rows, "CPU", warm_up=2)["share_of_peak"] is None
    assert judge({"failed": "out of memory"}, CASE, rows, "CPU", 2) == {"failed": "out of memory"}


# ------------------------------------------------------------------ all cases
@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """Runs the script with runs that are made up; returns what ran."""
    ran, answers = [], {}

    def run(program, words, *_, **__):
        ran.append(program.name)
        answer = answers.get(len(ran), NOTED)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr(gpu_throughput, "run_case", run)
    monkeypatch.setattr(gpu_throughput, "described", lambda *_: HAS)
    monkeypatch.setattr(gpu_throughput, "model_for", lambda *_: tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    words = "--device cpu --shapes tiny --modes lora --steps 4 --warm_up 2 --max_len 128 --rows 2"
    flags = [*words.split(), "--folder", str(tmp_path / "f"), "--output", str(tmp_path / "found.json")]

    def call(*more):
        ran.clear()
        main([*flags, *more])
        return json.loads((tmp_path / "found.json").read_text())["runs"]

    return call, ran, answers


def test_a_crash_costs_one_case_and_failed_ones_are_tried_again(pretended, capsys):
    call, ran, answers = pretended
    answers |= {2: {"failed": "out of memory"}, 3: {"failed": "ValueError: no"}, 4: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        call()
    assert ran == ["LLM-Dojo", "TRL", "LLM-Dojo", "TRL"]
    answers.clear()
    runs = call()
    assert ran == ["LLM-Dojo", "TRL"]  # what did not fit is not tried again
    assert [run.get("failed") for run in runs] == [None, "out of memory", None, None]
    assert len({key(run) for run in runs}) == 4
    call()
    assert ran == []
    said = capsys.readouterr().out
    assert "2 of 4  tiny lora best TRL 0: out of memory\n" in said and "1 of 2  tiny lora default LLM-Dojo 0: " in said
    assert "| TINY | LoRA | best | 200 tokens/s, 5.0 GB | out of memory | – |" in said


def test_no_case_starts_after_the_time(pretended, capsys):
    call, ran, _ = pretended
    with pytest.raises(FileNotFoundError):
        call("--minutes", "0")  # so no results are written
    assert ran == [] and "0 minutes are over, 4 cases are left" in capsys.readouterr().out


def test_other_conditions_are_not_mixed(pretended, capsys):
    call, ran, _ = pretended
    call("--peer", "none")
    assert ran == ["LLM-Dojo", "LLM-Dojo"]
    with pytest.raises(SystemExit) as end:
        call("--seed", "7")
    assert end.value.code == 2 and "holds results with other settings" in capsys.readouterr().err
    assert len(call("--seed", "7", "--again", "--settings", "best")) == 2


@pytest.mark.parametrize(
    ("argv", "reasons"),
    [
        (["--shapes", "70b"], ["invalid choice: '70b'"]),
        (["--steps", "5", "--rows", "0"], ["--rows 0 is not allowed", "--warm_up 5 leaves none of --steps 5"]),
        (["--minutes", "-1"], ["--minutes -1.0 is not allowed; give at least 0"]),
        (["--device", "cpu"], ["needs an --output of its own"]),
        (["--peer_python", "nothing"], ["'nothing' is no program"]),
    ],
)
def test_wrong_flags_are_refused(argv, reasons, capsys):
    with pytest.raises(SystemExit) as end:
        parse(argv)
    said = capsys.readouterr().err
    assert end.value.code == 2 and all(reason in said for reason in reasons)


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(gpu_throughput, "described", lambda *_: HAS)
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2 and "there is no GPU here" in capsys.readouterr().err


def test_a_file_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(SystemExit) as end:
        main(["--table", "--output", str(tmp_path / "other.json")])
    assert end.value.code == 2 and "holds something else than results" in capsys.readouterr().err


# ------------------------------------------------------------------ the table
def test_the_table_of_several_repeats():
    def run(program, repeat, speed):
        figures = {"tokens_per_second": speed, "share_of_peak": speed / 1e4, "peak_gb": 20 + repeat}
        which = {**CASE, "shape": "7b", "program": program, "repeat": repeat}
        return {**which, **figures, "gradient_checkpointing": False}

    runs = [run("LLM-Dojo", 0, 4000), run("LLM-Dojo", 1, 5000), run("TRL", 0, 2000), run("TRL", 1, 2000)]
    runs += [{**CASE, "shape": "7b", "mode": "full", "failed": "out of memory"}]
    settings = {"steps": 20, "warm_up": 5, "rows": 16, "max_len": 2048, "seed": 42, "torch_compile": False}
    card = {"name": "NVIDIA H100", "memory_gb": 85.0, "driver": "1", "cuda": "13.0"}
    said = table({"card": card, "versions": {"torch": "2.13.0"}, "settings": settings, "runs": runs})
    row = next(line for line in said.splitlines() if line.startswith("| 7B | LoRA | best"))
    assert row.split(" | ")[3:] == [
        "4,500 tokens/s (4,000 to 5,000), 45 % of the peak, 21.0 GB",
        "2,000 tokens/s (2,000 to 2,000), 20 % of the peak, 21.0 GB",
        "2.25 (2.00 to 2.50) |",
    ]
    assert "| 7B | full | best | out of memory | not measured | not measured |" in said
    assert said.endswith(
        "NVIDIA H100, 85 GB, driver 1, CUDA 13.0; torch 2.13.0. 20 steps, of which the first 5 do not count; 16 rows a "
        "step, or as many tokens in packed rows of 2,048; repeats: 2; seed 42."
    )


def test_the_readmes_table_is_what_was_measured():
    file = ROOT / "benchmarks" / "results" / "gpu_throughput.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    assert table_in(ROOT / "benchmarks" / "README.md", "results/gpu_throughput.json") == table(results)
    assert table(None).count("not measured") == 3 * 2 * 2 * 3


@pytest.mark.slow
@pytest.mark.usefixtures("fast_processes")
def test_the_script_measures_a_tiny_shape_in_both_programs(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    output, before = tmp_path / "found.json", {path.name for path in ROOT.iterdir()}
    monkeypatch.setattr(gpu_throughput, "described", lambda *_: HAS)
    words = "--shapes tiny --device cpu --modes lora --settings best --steps 3 --warm_up 1 --rows 8 --max_len 128"
    main([*words.split(), "--folder", str(tmp_path / "f"), "--output", str(output)])
    assert not {path.name for path in ROOT.iterdir()} - before  # what a run writes lies in --folder alone
    runs = json.loads(output.read_text(encoding="utf-8"))["runs"]
    assert [run["program"] for run in runs] == ["LLM-Dojo", "TRL"]
    assert runs[0]["tokens"] == runs[1]["tokens"] and len(runs[0]["tokens"]) == 3, runs  # the same work
    for run in runs:
        assert run["tokens_per_second"] > 0 and run["peak_gb"] > 0.1 and run["attention"] == "sdpa"
        assert len(run["seconds_after_the_first_step"]) == 2 and not run["gradient_checkpointing"]
