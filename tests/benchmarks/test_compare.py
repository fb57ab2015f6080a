"""The comparison with the peers: the clock, each program's words, and what the table makes of the figures."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from conftest import ROOT
from transformers import AutoTokenizer

from benchmarks import compare, peers
from benchmarks.compare_table import CHINESE, in_chinese, ratios, table
from benchmarks.compare_work import answered_rows, made_once
from benchmarks.peers import Program, Work, environment, write_rows
from benchmarks.tables import table_in
from utils.runtime.errors import UserError

ROWS = [{"instruction": "Say hi.", "input": "", "output": "Hi."}, {"instruction": "1 + 2", "output": "3"}]


def test_the_clock_notes_each_optimizer_step(tmp_path):
    script = (
        "import torch\nweight = torch.nn.Parameter(torch.ones(1))\noptimizer = torch.optim.AdamW([weight])\n"
        "for _ in range(3):\n    weight.grad = torch.ones(1); optimizer.step()\n"
    )
    env = environment(Program("TRL", Path(sys.executable)), tmp_path / "clock", tmp_path, threads=1)
    start = time.time()
    subprocess.run([sys.executable, "-c", script], env=env, check=True, timeout=120)
    steps = [float(line) for line in (tmp_path / "clock").read_text().split()]
    assert len(steps) == 3 and start < steps[0] <= steps[1] <= steps[2] < time.time()


@pytest.fixture
def work(tmp_path):
    return Work(base=tmp_path / "base", data=write_rows(tmp_path / "data", ROWS), max_steps=3)


def test_all_programs_get_the_same_rows(work):
    pairs = [json.loads(line) for line in (work.data / "trl" / "train.jsonl").read_text().splitlines()]
    assert [[turn["role"] for turn in pair["prompt"] + pair["completion"]] for pair in pairs] == [
        ["system", "user", "assistant"]
    ] * 2
    assert [pair["completion"][0]["content"] for pair in pairs] == ["Hi.", "3"]
    assert [json.loads(line) for line in (work.data / "rows.jsonl").read_text().splitlines()] == ROWS
    assert json.loads((work.data / "dataset_info.json").read_text()) == {"rows": {"file_name": "rows.jsonl"}}


def test_our_words_and_trls_are_understood_and_say_the_same(work, tmp_path):
    from trl.scripts.sft import make_parser

    from utils.args import parse_args

    def words(name):
        return Program(name, Path("python")).command(work, tmp_path / "out" / "run")[1:]

    tiny.save_tiny_model(tmp_path / "base")
    common, ours = parse_args(words("LLM-Dojo")[1:])
    _, theirs, model, _ = make_parser().parse_args_into_dataclasses(words("TRL")[2:])
    for name in ("learning_rate", "max_steps", "per_device_train_batch_size", "seed", "bf16", "num_train_epochs"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert (common.lora_rank, common.lora_alpha, common.max_len) == (model.lora_r, model.lora_alpha, theirs.max_length)
    settings = json.loads(Path(words("LLaMA-Factory")[-1]).read_text())
    for name in ("learning_rate", "max_steps", "per_device_train_batch_size", "seed", "bf16", "num_train_epochs"):
        assert settings[name] == getattr(ours, name), name
    assert (settings["lora_rank"], settings["lora_alpha"]) == (8, 16) and settings["gradient_accumulation_steps"] == 1


def test_a_command_that_fails_is_kept_with_what_it_said(tmp_path, monkeypatch):
    program = Program("LLM-Dojo", Path(sys.executable))
    monkeypatch.setattr(Program, "command", lambda *_: [sys.executable, "-c", "raise SystemExit('no such rows')"])
    found = compare.run(program, Work(tmp_path, tmp_path), tmp_path, threads=1)
    assert found == {"error": "no such rows\n"}


def test_bad_flags_are_told_all_at_once_before_anything_is_installed(tmp_path):
    said = refused_by("--repeats", "0", "--threads", "-1", "--many_rows", "0", "5", "--programs", "TLR")
    for told in ("--repeats 0", "--threads -1", "--many_rows 0", "Did you mean 'TRL'?", "--data is missing"):
        assert told in said
    assert "invalid choice: 'nothing'" in refused_by("--only", "nothing")
    rows = write_rows(tmp_path, ROWS) / "rows.jsonl"
    odd = tmp_path / "odd.jsonl"
    odd.write_text(
        '{"instruction": "a\u2028b", "output": "c"}\n\n{"instruction": "a", "output": ""}\n', encoding="utf-8"
    )
    assert compare.parse(["--data", str(odd)]).data == odd and len(answered_rows(odd)) == 1
    half = tmp_path / "half.json"
    half.write_text('{"runs": [')
    for output, said in (
        (half, "holds no results"),
        (tmp_path, "cannot be written"),
        (half / "x", "cannot be written"),
    ):
        assert f"--output '{output}' {said}" in refused_by("--data", str(rows), "--output", str(output))
    assert "is no folder" in refused_by("--data", str(rows), "--folder", str(half))
    assert "give an --output of its own" in refused_by("--data", str(rows), "--rows", "5")
    for line in ('{"instruction": "Say hi."}', '{"instruction": "Say hi.", "output": 3}', "[1]", "{"):
        bad = tmp_path / "bad.jsonl"
        bad.write_text(rows.read_text() + line + "\n")
        assert f"{bad}:3 is no alpaca row" in refused_by("--data", str(bad))
    bad.write_text('{"instruction": "Say hi.", "output": " "}\n')
    assert "has no row with an answer" in refused_by("--data", str(bad))


def refused_by(*flags):
    words = [sys.executable, "benchmarks/compare.py", *flags]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.slow
def test_a_peer_that_cannot_be_installed_is_told_and_tried_again(tmp_path, monkeypatch):
    monkeypatch.setitem(peers.INSTALL, "TRL", [str(tmp_path / "missing==1")])
    for _ in range(2):
        with pytest.raises(UserError, match="TRL could not be installed"):
            peers.install("TRL", tmp_path / "trl")


def made(case, program, repeat, turn="first", **figures):
    return {"case": case, "program": program, "repeat": repeat, "turn": turn, **figures}


RESULTS = {
    "trained_tokens": {"default": 1000},
    "runs": [
        made("default", "LLM-Dojo", 0, steps=11, training=10, peak=4, first_step=5),
        made("default", "TRL", 0, steps=11, training=25, peak=10, first_step=5),
        made("default", "LLM-Dojo", 1, steps=11, training=10, peak=6, first_step=5),
        made("default", "TRL", 1, steps=11, training=20, peak=10, first_step=5),
        made("default", "LLaMA-Factory", 0, error="gone"),
        made("first step", "LLM-Dojo", 0, first_step=4),
        made("first step", "TRL", 0, first_step=10),
        made("preparing", "LLM-Dojo", 0, first_step=14),
        made("preparing", "LLM-Dojo", 0, turn="again", first_step=5),
        made("preparing", "TRL", 0, first_step=50),
        made("preparing", "TRL", 0, turn="again", first_step=10),
    ],
}


def test_ratios_are_taken_within_a_repeat():
    assert ratios(RESULTS, "default", "throughput", "TRL") == pytest.approx([2.5, 2.0])
    assert ratios(RESULTS, "default", "peak", "TRL") == pytest.approx([0.4, 0.6])
    assert ratios(RESULTS, "default", "throughput", "LLaMA-Factory") == []
    assert ratios(RESULTS, "preparing", "preparing", "TRL") == pytest.approx([(50 - 10) / (14 - 4)])
    assert ratios(RESULTS, "preparing", "again", "TRL") == pytest.approx([2.0])


def test_the_table_says_what_was_missed_and_what_was_not_measured():
    lines = table(RESULTS).splitlines()
    assert "| at least 2.2 | 2.25 (2.00 to 2.50) | not measured |" in lines[2]
    assert "| at most 0.5 | 0.50 (0.40 to 0.60) | not measured |" in lines[4]
    assert "4.00 | not measured |" in lines[7] and "2.00, goal missed" in lines[8] and "| 0.40 |" in lines[9]


def test_many_rows_are_set_beside_fewer_of_the_same_repeat():
    runs = [
        made("many rows", "LLM-Dojo", repeat, turn=turn, peak=peak)
        for repeat, peaks in enumerate([(10, 10), (10, 12)])
        for turn, peak in zip(("100000", "1000000"), peaks, strict=True)
    ]
    assert table(RESULTS | {"runs": runs}).splitlines()[10].endswith("| at most 1.1 | 1.10 (1.00 to 1.20) (itself) | |")
    assert "| not measured | |" in table(RESULTS)


@pytest.mark.slow
def test_whole_cases_of_this_project_alone(tmp_path):
    """The script itself, on few rows; the peers are not installed by a test."""
    data, output = tmp_path / "rows.jsonl", tmp_path / "new" / "out.json"
    rows = [
        {"instruction": f"Count to {number}.", "output": "one two three " * (number % 5 + 1)} for number in range(24)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output.parent.mkdir()
    theirs = made("default", "TRL", 0, steps=3, training=1, peak=1, first_step=1)
    before = [theirs, made("default", "LLM-Dojo", 7, error="gone"), made("best", "LLM-Dojo", 0, error="gone")]
    output.write_text(json.dumps({"runs": before, "trained_tokens": {"best": 5}}))
    flags = ["--data", str(data), "--repeats", "1", "--threads", "1", "--folder", str(tmp_path / "f")]
    flags += ["--many_rows", "12", "48", "--output", str(output), "--programs", "llm-dojo"]
    compare.main([*flags, "--only", "default", "many rows"])
    kept = json.loads(output.read_text())
    assert kept["runs"][:2] == [theirs, before[2]] and kept["threads"] == 1  # what others measured stays
    found, few, many = kept["runs"][2:]
    assert found["steps"] == 3 and found["first_step"] > 0 and found["training"] > 0 and found["peak"] > 100e6
    assert (few["turn"], many["turn"], many["steps"]) == ("12", "48", 3) and few["peak"] > 100e6
    (numbered,) = (tmp_path / "f").glob("data-48-numbered-*/rows.jsonl")
    assert len(set(numbered.read_text().splitlines())) == 48
    tokenizer = AutoTokenizer.from_pretrained(next((tmp_path / "f").glob("small-*")))
    answers = sum(len(tokenizer(row["output"] + "<|im_end|>").input_ids) for row in rows)
    assert kept["trained_tokens"] == {"best": 5, "default": answers}
    assert not list((tmp_path / "f").glob("tmp*")) and [path.name for path in output.parent.iterdir()] == ["out.json"]


def test_a_run_that_fails_ends_with_exit_code_1_and_costs_no_other_result(tmp_path, monkeypatch, capsys):
    output = tmp_path / "out.json"
    monkeypatch.setattr(compare, "make_base", lambda shape, folder, data: folder.mkdir())
    monkeypatch.setattr(Program, "command", lambda *_: [sys.executable, "-c", "raise SystemExit('no such rows')"])
    rows = write_rows(tmp_path, ROWS) / "rows.jsonl"
    flags = ["--data", str(rows), "--folder", str(tmp_path / "f"), "--output", str(output), "--repeats", "1"]
    with pytest.raises(SystemExit) as end:
        compare.main([*flags, "--programs", "LLM-Dojo", "--only", "first step"])
    assert end.value.code == 1 and "1 of the runs failed" in capsys.readouterr().err
    kept = json.loads(output.read_text())
    assert [run["error"] for run in kept["runs"]] == ["no such rows\n"] and "(first step" not in table(kept)


def test_what_is_half_made_is_made_anew(tmp_path):
    def make(part, text, fails=False):
        part.mkdir()
        (part / "a").write_text(text)
        if fails:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made_once(tmp_path / "x", lambda part: make(part, "half", fails=True))
    for text in ("whole", "never made"):
        assert (made_once(tmp_path / "x", lambda part, text=text: make(part, text)) / "a").read_text() == "whole"


def test_shares_of_a_step():
    """Each operator counts in one group, and the shares add up to all of the time."""
    from benchmarks.profile_steps import shares

    times = {
        "aten::mm": 6.0,
        "aten::_scaled_dot_product_flash_attention_for_cpu": 2.0,
        "aten::embedding": 1.0,
        "aten::expand": 1.0,
    }
    found = dict(shares(times))
    assert (found["matrix products"], found["attention"], found["the rest"]) == (0.6, 0.2, 0.2)
    assert sum(found.values()) == 1.0


@pytest.mark.parametrize("page", ["README.md", "README_zh.md", "benchmarks/README.md"])
def test_the_pages_show_what_was_measured(page):
    written = table(json.loads(compare.RESULTS.read_text()))
    written = in_chinese(written) if page == "README_zh.md" else written
    assert table_in(ROOT / page, "results/compare.json") == written


def test_the_chinese_table_leaves_no_english_words_of_its_own():
    left = in_chinese(table(RESULTS))
    assert not [words for words in CHINESE if words in left] and "2.00，未达到目标" in left
