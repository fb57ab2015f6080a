"""Answering a file of rows: in order, as the chat does, and continued after a kill."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from answering import ROWS, answered, load
from conftest import ROOT, write_rows

from utils.data.conversations import to_messages
from utils.infer import answer_rows
from utils.infer.answer_file import AnswerFile
from utils.infer.prompts import read_prompts
from utils.runtime.errors import UserError
from utils.script import infer


def test_answers_equal_the_chats_and_can_be_read_as_rows(run_folder, tmp_path, capsys):
    output = answered(run_folder, tmp_path, ROWS)
    assert "answering: 100%" in capsys.readouterr().err
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    asked, _ = read_prompts(str(tmp_path / "rows.jsonl"), "--input")
    assert [row["line"] for row in rows] == list(range(1, len(ROWS) + 1))
    chat = load(model_path=str(run_folder), dtype="float32", max_new_tokens=12)
    for row, prompt in zip(rows, asked, strict=True):
        chat.messages = prompt.messages[:-1]
        assert row["answer"] == chat.answer(prompt.messages[-1]["content"], stream=False)
        assert (
            row["messages"] == [*prompt.messages, {"role": "assistant", "content": row["answer"]}] == to_messages(row)
        )
        assert (row["file"], row.get("reference")) == (prompt.file, prompt.reference)
    assert rows[len(tiny.ROWS)]["answer"] == "Hello!" and "reference" not in rows[len(tiny.ROWS)]
    again, problems = read_prompts(str(output), "--input")
    assert not problems and [row.messages for row in again] == [row.messages for row in asked]
    assert [row.reference for row in again][0] == asked[0].reference


def test_rows_that_cannot_be_answered_are_named_and_skipped(run_folder, tmp_path, capsys, refused):
    rows = [
        {"instruction": "Hi"},
        {"text": "Hi"},
        {"instruction": "word " * 600},
        {"prompt": "Who?", "tools": [{"name": "x"}]},
        {"messages": [{"role": "tool", "content": "7"}]},
        {"instruction": " "},
        {"instruction": "Who?", "system": "S"},
    ]
    output = answered(run_folder, tmp_path, rows, "--system", "Be brief.")
    told = capsys.readouterr().err
    file = tmp_path / "rows.jsonl"
    for line, text in [(2, "has the fields ['text']"), (3, "the model's context is 512"), (4, "does not support tools"),
                       (5, "no such role: tool"), (6, "has an empty instruction")]:  # fmt: skip
        assert f"{file}:{line} " in told and text in told
    named = [line.split(" ")[0] for line in told.replace("  ", "").splitlines() if line.strip().startswith(str(file))]
    assert named == [f"{file}:{number}" for number in range(2, 7)]  # too long, or of no form: in the order of the file
    assert "5 of 7 rows cannot be answered" in told and "2 answers in" in told and "5 rows have no answer" in told
    kept = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["line"], row["messages"][0]["content"]) for row in kept] == [(1, "Be brief."), (7, "S")]
    flags = ["--model_path", str(run_folder), "--input", str(file), "--output", str(tmp_path / "b.jsonl")]
    message = refused(infer.main, *flags, "--on_bad_row", "error")
    assert f"{file}:6 " in message and "--on_bad_row error" in message and not list(tmp_path.glob("b.jsonl*"))
    write_rows(file, rows[1:3])
    assert "none of the rows" in refused(infer.main, *flags)
    assert not list(tmp_path.glob("b.jsonl*"))


def test_rows_of_several_files_are_named_in_reading_order(run_folder, tmp_path, refused):
    long, bad = {"instruction": "word " * 600}, {"text": "Hi"}
    (tmp_path / "in").mkdir()
    for name, rows in [("b.jsonl", [long, bad] * 6), ("a.jsonl", [bad, long]), ("b.jsonl:1 x.jsonl", [long])]:
        write_rows(tmp_path / "in" / name, rows)
    message = refused(infer.main, "--model_path", str(run_folder), "--input", str(tmp_path / "in"),
                   "--output", str(tmp_path / "b.jsonl"))  # fmt: skip
    named = [line.split("/in/")[1] for line in message.splitlines() if "/in/" in line]
    wanted = [f"a.jsonl:{n} " for n in (1, 2)] + [f"b.jsonl:{n} " for n in range(1, 13)] + ["b.jsonl:1 x.jsonl:1 "]
    assert len(named) == len(wanted)
    assert all(line.startswith(start) for line, start in zip(named, wanted, strict=True)), named


KILLER = """
import os, signal, sys
from pathlib import Path
from utils.infer.answer_file import AnswerFile
from utils.runtime.command import run_command
from utils.script import infer

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

write = AnswerFile._write

def torn(file, entry):
    if len(file.done) == 5:
        file._file.write(b'{"number": 0, "row": {"file')
        file._file.flush()
        die()
    write(file, entry)

where = sys.argv.pop(1)
if where == "a line":
    AnswerFile._write = torn
elif where == "the sorting":
    os.replace = die
elif where == "the end":
    Path.unlink = die
run_command(infer.main)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("fast_processes")
def test_a_killed_command_continues_without_lost_or_repeated_answers(run_folder, tmp_path, monkeypatch):
    for name in ("undisturbed", "killed"):
        (tmp_path / name).mkdir()
    flags = ["--do_sample", "true", "--temperature", "2"]  # random numbers, too, are those of an undisturbed run
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    command = ["--model_path", str(run_folder), "--input", rows, "--dtype", "float32", "--max_new_tokens", "12", *flags]
    whole = tmp_path / "undisturbed" / "answers.jsonl"
    infer.main([*command, "--output", str(whole), "--batch_size", "4"])
    output = tmp_path / "killed" / "answers.jsonl"
    command += ["--output", str(output), "--batch_size", "3"]
    lines = []
    for where, left in [
        ("a line", ["answers.jsonl.partial"]),
        ("the sorting", ["answers.jsonl.part", "answers.jsonl.partial"]),
        ("the end", ["answers.jsonl", "answers.jsonl.partial"]),
    ]:
        killed = subprocess.run(
            [sys.executable, "-c", KILLER, where, *command], cwd=ROOT, capture_output=True, text=True
        )
        assert killed.returncode == -9, killed.stderr
        assert sorted(path.name for path in output.parent.iterdir()) == left
        lines.append(Path(f"{output}.partial").read_bytes().splitlines())
    assert len(lines[0]) == 1 + 5 + 1 and lines[1][:6] == lines[0][:6] and len(lines[1]) == 1 + len(ROWS)
    assert lines[2] == lines[1]
    monkeypatch.setattr(answer_rows, "load_for_inference", None)  # the model is not needed any more
    infer.main(command)
    assert [path.name for path in output.parent.iterdir()] == ["answers.jsonl"]
    assert output.read_bytes() == whole.read_bytes()


def test_an_unfinished_file_continues_only_with_the_same_settings(
    run_folder, tiny_models, tmp_path, refused, monkeypatch
):
    output = tmp_path / "answers.jsonl"

    def stop(file, number, row):
        if len(file.done) == 4:
            raise UserError("stopped")
        write(file, number, row)

    write = AnswerFile.write
    monkeypatch.setattr(AnswerFile, "write", stop)
    with pytest.raises(UserError, match="stopped"):
        answered(run_folder, tmp_path, ROWS)
    monkeypatch.undo()
    partial = Path(f"{output}.partial")
    begun = partial.read_bytes()
    rows = tmp_path / "rows.jsonl"
    flags = ["--model_path", str(run_folder), "--input", str(rows), "--output", str(output), "--dtype", "float32"]
    message = refused(infer.main, *flags, "--max_new_tokens", "13", "--system", "S")
    assert "--max_new_tokens was 12 and is 13" in message and "--system was None and is 'S'" in message
    assert "--overwrite true" in message and "--dtype" not in message
    other = [tiny_models(), "--template_name", "qwen", "--max_new_tokens", "12"]
    message = refused(infer.main, "--model_path", *other, *flags[2:])
    assert f"the model was '{run_folder} (weights" in message and f"and is '{tiny_models()} (weights" in message
    was = rows.read_bytes()
    write_rows(rows, ROWS[:-1])
    assert f"the content of --input {rows} was" in refused(infer.main, *flags, "--max_new_tokens", "12")
    assert partial.read_bytes() == begun
    rows.write_bytes(was)
    held = AnswerFile(str(tmp_path / "other.jsonl"), {}, {1})
    assert "by another process" in refused(lambda argv: AnswerFile(str(tmp_path / "other.jsonl"), {}, {1}))
    held.close()
    Path(f"{tmp_path}/other.jsonl.partial").unlink()
    asked = []
    answer_all = answer_rows.answer_all
    monkeypatch.setattr(
        answer_rows, "answer_all", lambda *given, **more: (asked.append(given[2]), answer_all(*given, **more))[1]
    )
    whole = answered(run_folder, tmp_path, ROWS, "--batch_size", "2").read_bytes()
    assert len(asked[0]) == len(ROWS) - 4
    assert "exists; give another file, or --overwrite true" in refused(infer.main, *flags, "--max_new_tokens", "12")
    assert answered(run_folder, tmp_path, ROWS, "--overwrite", "true").read_bytes() == whole
    partial.write_bytes(begun)
    assert "exists; give another file" in refused(infer.main, *flags, "--max_new_tokens", "12")
    partial.write_text("notes of mine\n")
    output.unlink()
    assert "was not written by infer" in refused(infer.main, *flags)
    assert partial.read_text() == "notes of mine\n"


@pytest.mark.parametrize(("flags", "told"), [
    (["--input", "ROWS"], "--output is missing"),
    (["--output", "x.jsonl", "--batch_size", "2"], "--output, --batch_size without --input"),
    (["--input", "ROWS", "--output", "ROWS"], "is one of the files of --input"),
    (["--input", "ROWS", "--output", "x.txt"], "does not end in .jsonl"),
    (["--input", "ROWS", "--output", "x.jsonl", "--prompt", "Hi"], "--prompt and --input are both given"),
    (["--input", "ROWS", "--output", "x.jsonl", "--batch_size", "0"], "--batch_size 0"),
    (["--input", "ROWS", "--output", "x.jsonl", "--dtype", "float33"], "Did you mean 'float32'"),
    (["--input", "nowhere.jsonl", "--output", "x.jsonl"], "'nowhere.jsonl' does not exist"),
    (["--prompt", " "], "--prompt ' ' is empty"),
    (["--do_sample", "true", "--num_beams", "2"], "do not go together"),
])  # fmt: skip
def test_refused_flags_with_input(refused, tiny_models, rows_file, flags, told):
    flags = [flag.replace("ROWS", rows_file) for flag in flags]
    assert told in refused(infer.main, "--model_path", tiny_models(), *flags)
