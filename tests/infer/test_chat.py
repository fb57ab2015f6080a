"""The chat: commands, a full context, and a terminal with Ctrl-C and Ctrl-D."""

import io
import json
import sys

import pytest
from answering import printed
from conftest import ROOT

from utils.data.conversations import to_messages
from utils.script import infer


def test_several_turns_until_the_end_of_stdin(run_folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n\nWho?\n"))
    out = printed(capsys, "--model_path", str(run_folder), "--max_new_tokens", "12")
    assert out.startswith("Hello!\n")
    assert len(out.splitlines()) >= 2


def typed(monkeypatch, capsys, text, *flags):
    """What a chat says, to stdout and to stderr, when `text` comes through a pipe."""
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    capsys.readouterr()
    infer.main(list(flags))
    return capsys.readouterr()


def test_commands_are_run_and_not_sent_to_the_model(run_folder, capsys, monkeypatch, tmp_path):
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


def test_a_full_context_does_not_end_the_chat(tiny_models, capsys, monkeypatch):
    small = ["--model_path", tiny_models(max_position_embeddings=64), "--template_name", "qwen"]
    lines = "word " * 80 + "\nHi\nHi\n/system Be brief.\n"
    out, told = typed(monkeypatch, capsys, lines, *small, "--max_new_tokens", "400", "--repetition_penalty", "1.2")
    assert "model's context is 64; shorten it; /reset starts a new conversation" in told
    assert "cut off: the model's context is full; /reset" in told
    assert "a new conversation, with the system message 'Be brief.'" in told and out
    told = typed(monkeypatch, capsys, "Hi\n", *small, "--max_new_tokens", "2", "--system", "S").err
    assert "cut off by --max_new_tokens 2" in told


def test_beam_search_prints_the_answer_at_its_end(run_folder, capsys):
    assert printed(capsys, "--model_path", str(run_folder), "--prompt", "Hi", "--num_beams", "2") == "Hello!\n"


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
