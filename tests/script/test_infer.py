"""Talking to a run and answering files: what it sees, where it stops, commands, kills, and what is refused."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from conftest import ROOT, write_rows

from utils.data.conversations import to_messages
from utils.infer import answer_rows
from utils.infer.answer_file import AnswerFile
from utils.infer.load import check_trained
from utils.infer.prompts import read_prompts
from utils.runtime.errors import UserError
from utils.script import infer


def load(**values):
    args = infer.InferArgs(**values)
    return infer.load_chat(args, check_trained(args)[0])


def said(capsys, *flags):
    capsys.readouterr()
    infer.main(list(flags))
    return capsys.readouterr().out


def test_a_prompt_is_answered_as_trained_and_stops(run_folder, capsys):
    for prompt, answer in tiny.LEARNED:
        assert said(capsys, "--model_path", str(run_folder), "--prompt", prompt) == answer + "\n"


def test_the_model_sees_the_ids_it_was_trained_on(run_folder, monkeypatch):
    """The prompt's ids are the beginning of the training row's, to the token before the answer."""
    from transformers import AutoTokenizer

    from utils.template import get_template

    chat = load(model_path=str(run_folder))
    seen = []
    generate = chat.model.generate
    monkeypatch.setattr(
        chat.model, "generate", lambda **options: (seen.append(options["input_ids"]), generate(**options))[1]
    )
    chat.answer("Hi", stream=False)
    chat.answer("Who?", stream=False)
    tokenizer = AutoTokenizer.from_pretrained(run_folder)
    tokenizer.eos_token = "<|endoftext|>"
    row = get_template("qwen", tokenizer).encode(
        [*chat.messages[:3], {"role": "assistant", "content": "The fox."}], tokenizer
    )
    trained = [i for i, label in enumerate(row["labels"]) if label != -100]
    answer_from = next(i for i in reversed(trained) if i - 1 not in trained)
    assert seen[1][0].tolist() == row["input_ids"][:answer_from]


def test_several_turns_until_ctrl_d(run_folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n\nWho?\n"))
    out = said(capsys, "--model_path", str(run_folder), "--max_new_tokens", "12")
    assert out.startswith("Hello!\n")
    assert len(out.splitlines()) >= 2


def test_an_adapter_and_a_base_with_a_template(train, tiny_models, capsys):
    folder = train()
    assert said(capsys, "--model_path", str(folder), "--prompt", "Hi", "--max_new_tokens", "3")
    base = ["--model_path", tiny_models(), "--prompt", "Hi", "--max_new_tokens", "3"]
    assert said(capsys, *base, "--template_name", "qwen")


def test_sampling_with_a_seed_repeats(run_folder, capsys):
    flags = [
        "--model_path",
        str(run_folder),
        "--prompt",
        "Hi",
        "--do_sample",
        "true",
        "--temperature",
        "3",
        "--max_new_tokens",
        "9",
    ]
    assert said(capsys, *flags, "--seed", "1") == said(capsys, *flags, "--seed", "1")


def test_greedy_is_the_default_and_equals_a_loop_of_argmax(run_folder):
    chat = load(model_path=str(run_folder), max_new_tokens=6)
    text = chat.answer("Something unseen", stream=False)
    inputs = chat.tokenizer.apply_chat_template(
        chat.messages[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids, start = inputs["input_ids"], inputs["input_ids"].shape[1]
    stops = chat.model.generation_config.eos_token_id
    with torch.inference_mode():
        for _ in range(6):
            ids = torch.cat([ids, chat.model(ids).logits[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] in stops:
                break
    assert chat.tokenizer.decode(ids[0, start:], skip_special_tokens=True) == text


@pytest.mark.parametrize(("flags", "told"), [
    ([], "--model_path is missing"),
    (["--model_path", "nowhere/at/all"], "does not exist"),
    (["--model_path", "x", "--temperature", "0"], "--temperature 0.0"),
    (["--model_path", "x", "--top_p", "2"], "--top_p 2.0"),
    (["--model_path", "x", "--promt", "Hi"], "Did you mean '--prompt'"),
])  # fmt: skip
def test_what_is_refused(refused, flags, told):
    assert told in refused(infer.main, *flags)


def test_a_base_without_a_format_and_an_adapter_without_its_base(refused, tiny_models, train, tmp_path):
    assert "--template_name" in refused(infer.main, "--model_path", tiny_models(), "--prompt", "Hi")
    moved = tmp_path / "moved"
    shutil.copytree(train(), moved)
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone/base"}))
    assert "/gone/base" in refused(infer.main, "--model_path", str(moved), "--prompt", "Hi")


def typed(monkeypatch, capsys, text, *flags):
    """What a chat says, to stdout and to stderr, when `text` comes through a pipe."""
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    capsys.readouterr()
    infer.main(list(flags))
    return capsys.readouterr()


def test_commands_are_obeyed_and_never_sent(run_folder, capsys, monkeypatch, tmp_path):
    sent = []
    answer = infer.Chat.answer
    monkeypatch.setattr(
        infer.Chat, "answer", lambda chat, text: (sent.append((chat.messages, text)), answer(chat, text))[1]
    )
    file = tmp_path / "chats.jsonl"
    file.write_text('{"instruction": "Hi", "output": "without a line feed"}')
    save = f"/save {file}"
    lines = [save, "Hi", "/rest", "/reset now", "//etc", save, "/save notes.txt", "/reset",
             "Hi", "/system Be brief.", "/reset", "Who?", save, "/system", "/help", "/exit", "Never said"]  # fmt: skip
    out, told = typed(monkeypatch, capsys, "\n".join(lines), "--model_path", str(run_folder), "--max_new_tokens", "9")
    assert [text for _, text in sent] == ["Hi", "/etc", "Hi", "Who?"]
    assert [len(before) for before, _ in sent] == [0, 2, 0, 1]
    assert sent[3][0] == [{"role": "system", "content": "Be brief."}]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows[0]["output"] and [len(row["messages"]) for row in rows[1:]] == [4, 3]
    assert to_messages(rows[1])[1] == {"role": "assistant", "content": "Hello!"}
    for text in ("no answer to save yet", "Did you mean '/reset'", "'now' was given", "saved 4 turns", "'notes.txt'",
                 "the system message 'Be brief.'", "the default system message", "/save FILE"):  # fmt: skip
        assert text in told
    assert out.startswith("Hello!\n") and "(" not in out


def test_a_full_context_ends_no_chat(tiny_models, capsys, monkeypatch):
    small = ["--model_path", tiny_models(max_position_embeddings=64), "--template_name", "qwen"]
    lines = "word " * 80 + "\nHi\nHi\n/system Be brief.\n"
    out, told = typed(monkeypatch, capsys, lines, *small, "--max_new_tokens", "400", "--repetition_penalty", "1.2")
    assert "model's context is 64; shorten it; /reset starts a new conversation" in told
    assert "cut off: the model's context is full; /reset" in told
    assert "a new conversation, with the system message 'Be brief.'" in told and out
    told = typed(monkeypatch, capsys, "Hi\n", *small, "--max_new_tokens", "2", "--system", "S").err
    assert "cut off by --max_new_tokens 2" in told


def test_beams_answer_at_once(run_folder, capsys):
    assert said(capsys, "--model_path", str(run_folder), "--prompt", "Hi", "--num_beams", "2") == "Hello!\n"


ENDLESS = """
import time
from utils.infer import chat
from utils.runtime.command import run_command
from utils.script import infer

def endless(*_):
    print("Once upon a", flush=True)
    while True:
        time.sleep(1)

chat.generate_ids = endless
run_command(infer.main)
"""


@pytest.mark.slow
def test_a_terminal_with_ctrl_c_and_ctrl_d(run_folder):
    """An endless answer is stopped, its turn forgotten, and the chat goes on until Ctrl-D."""
    import pexpect

    child = pexpect.spawn(sys.executable, ["-c", ENDLESS, "--model_path", str(run_folder)], cwd=ROOT, timeout=90)
    try:
        for sent, *seen in [
            ("Hi\r", "Once upon a"),
            ("\x03", "this turn is dropped", "> "),
            ("/save a.jsonl\r", "no answer to save yet", "> "),
            ("\x03", "Ctrl-D or /exit quits", "> "),
            ("\x04", pexpect.EOF),
        ]:
            if sent == "Hi\r":
                child.expect("> ")
            child.send(sent)
            for text in seen:
                child.expect(text)
        child.close()
        assert child.exitstatus == 0
    finally:
        child.close(force=True)


ROWS = [*tiny.ROWS, {"messages": [{"role": "user", "content": "Hi"}]}, *tiny.PAIRS]


def answered(model, folder, rows, *flags, output="answers.jsonl"):
    """Answers rows with the command, in this process; returns the file it leaves."""
    file = write_rows(folder / "rows.jsonl", rows)
    infer.main(["--model_path", str(model), "--input", file, "--output", str(folder / output), "--dtype", "float32",
                "--max_new_tokens", "12", "--batch_size", "4", *flags])  # fmt: skip
    assert sorted(path.name for path in folder.iterdir()) == sorted(["rows.jsonl", output])
    return folder / output


def test_a_batch_answers_as_the_chat_does_in_the_order_of_the_rows_and_can_be_read_again(run_folder, tmp_path, capsys):
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


def test_rows_that_cannot_be_answered_are_named_and_left_out(run_folder, tmp_path, capsys, refused):
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
    said = refused(infer.main, *flags, "--on_bad_row", "error")
    assert f"{file}:6 " in said and "--on_bad_row error" in said and not list(tmp_path.glob("b.jsonl*"))
    write_rows(file, rows[1:3])
    assert "none of the rows" in refused(infer.main, *flags)
    assert not list(tmp_path.glob("b.jsonl*"))


def test_rows_of_several_files_are_named_in_the_order_they_are_read(run_folder, tmp_path, refused):
    long, bad = {"instruction": "word " * 600}, {"text": "Hi"}
    (tmp_path / "in").mkdir()
    for name, rows in [("b.jsonl", [long, bad] * 6), ("a.jsonl", [bad, long]), ("b.jsonl:1 x.jsonl", [long])]:
        write_rows(tmp_path / "in" / name, rows)
    said = refused(infer.main, "--model_path", str(run_folder), "--input", str(tmp_path / "in"),
                   "--output", str(tmp_path / "b.jsonl"))  # fmt: skip
    named = [line.split("/in/")[1] for line in said.splitlines() if "/in/" in line]
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
def test_killed_at_a_line_while_sorting_and_at_the_end_it_goes_on_and_nothing_is_lost_or_doubled(
    run_folder, tmp_path, monkeypatch
):
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


def test_an_unfinished_file_goes_on_only_with_what_it_was_begun_with(
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
    said = refused(infer.main, *flags, "--max_new_tokens", "13", "--system", "S")
    assert "--max_new_tokens was 12 and is 13" in said and "--system was None and is 'S'" in said
    assert "--overwrite true" in said and "--dtype" not in said
    other = [tiny_models(), "--template_name", "qwen", "--max_new_tokens", "12"]
    said = refused(infer.main, "--model_path", *other, *flags[2:])
    assert f"the model was '{run_folder} (weights" in said and f"and is '{tiny_models()} (weights" in said
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


@pytest.mark.parametrize("left", range(0, 130, 9))
def test_whatever_a_kill_leaves_is_gone_on_with(tmp_path, left):
    def write(file, numbers):
        for number in numbers:
            file.write(number, {"answer": f"第{number}"})
        return file

    path, wanted = str(tmp_path / "a.jsonl"), {0, 1, 2, 3}
    write(AnswerFile(path, {"--seed": 1}, wanted), [2, 0]).close()
    partial = Path(f"{path}.partial")
    partial.write_bytes(partial.read_bytes()[:left])
    file = AnswerFile(path, {"--seed": 1}, wanted)
    assert file.done <= {2, 0} and (left < 115 or file.done)
    write(file, [number for number in (3, 2, 1, 0) if number not in file.done]).finish()
    assert Path(path).read_text(encoding="utf-8").splitlines() == [f'{{"answer": "第{number}"}}' for number in range(4)]
    assert not partial.exists()


def test_a_full_disk_says_how_to_go_on(tmp_path):
    file = AnswerFile(str(tmp_path / "a.jsonl"), {}, {1})
    file._file.close()
    file._file = open("/dev/full", "ab")  # noqa: SIM115
    with pytest.raises(UserError, match="No space left on device. Free some space; the same command then continues"):
        file.write(1, {"answer": "x"})


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
def test_what_a_batch_refuses(refused, tiny_models, rows_file, flags, told):
    flags = [flag.replace("ROWS", rows_file) for flag in flags]
    assert told in refused(infer.main, "--model_path", tiny_models(), *flags)
