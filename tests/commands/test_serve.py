"""`transformers serve` on a merged run, over loopback: the ids it sees are those that were trained, and it stops."""

import json
import os
import shlex
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import tiny
from conftest import ROOT, write_rows

from benchmarks.matrix import free_port
from utils.data.conversations import to_messages
from utils.template import get_template

COMMAND = "transformers serve output/merged --host 127.0.0.1 --port 8000"
MERGE = "python -m utils.script.merge_lora --model_path output/sft --output_dir output/merged"
KNOWN = [tiny.ROWS[number] for number in (0, 2, 3, 5, 6, 7)]
TAUGHT = [{**row, "output": KNOWN[(number + 3) % 6]["output"]} for number, row in enumerate(KNOWN)]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
CONVERSATIONS = {
    "question": QUESTION,
    "system": [{"role": "system", "content": "You are lazy. \n"}, {"role": "user", "content": "  Be brief. "}],
    "turns": [
        {"role": "system", "content": "You are lazy."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello\n\n你好 "},
        {"role": "user", "content": "你是谁？"},
        {"role": "assistant", "content": "我是一个人工智能助手。"},
        {"role": "user", "content": "Be brief.\n"},
    ],
}
# writes down what the server's model is given and what it answers with
SPY = """
import json, os
from transformers import GenerationMixin
generate = GenerationMixin.generate
def watched(self, *args, **kwargs):
    ids = generate(self, *args, **kwargs)
    with open(os.environ["SERVED"], "a") as file:
        given = kwargs["input_ids"][0].tolist()
        print(json.dumps([given, ids[0].tolist()[len(given):]]), file=file)
    return ids
GenerationMixin.generate = watched
"""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A base that answers in one way, a run that taught it another, and both merged as the README says."""
    import main_train
    from utils.script import merge_lora

    folder = tmp_path_factory.mktemp("serve")
    tiny.save_tiny_model(folder / "start")
    steps = [
        ("start", "base", KNOWN, ["--train_mode", "full", "--learning_rate", "0.003"]),
        ("base", "sft", TAUGHT, ["--train_special_tokens", "on", "--learning_rate", "0.01"]),
    ]
    for start, output, rows, flags in steps:
        main_train.main([
            "--model_name_or_path", str(folder / start), "--output_dir", str(folder / output), *flags,
            "--train_data_path", write_rows(folder / f"{output}.jsonl", rows), "--per_device_train_batch_size", "4",
            "--num_train_epochs", "80", "--precision", "fp32", "--report_to", "none", "--save_strategy", "no",
            "--disable_tqdm", "true",
        ])  # fmt: skip
    merge_lora.main(shlex.split(MERGE.replace("output/", f"{folder}/"))[3:])
    return folder


@pytest.fixture(scope="module")
def served(run):
    """An OpenAI client of the running server, and the file of what its model saw."""
    from openai import OpenAI

    seen, port = run / "seen.jsonl", free_port()
    (run / "spy").mkdir()
    (run / "spy" / "sitecustomize.py").write_text(SPY)
    words = shlex.split(COMMAND.replace("output/merged", str(run / "merged")).replace("8000", port))
    words[0] = str(Path(sys.executable).parent / words[0])
    # both ends keep to loopback
    alone = {"HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    env = {**os.environ, **alone, "SERVED": str(seen), "PYTHONPATH": str(run / "spy")}
    with pytest.MonkeyPatch.context() as patch, open(run / "server.log", "w") as log:
        for name, value in alone.items():
            patch.setenv(name, value)
        process = subprocess.Popen(words, env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            _until_it_answers(process, port, run / "server.log")
            yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60), seen
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _until_it_answers(process, port, log):
    for _ in range(480):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(0.25)
    pytest.fail(f"no answer: {log.read_text()[-3000:]}")


@pytest.fixture
def ask(run, served):
    """Asks the server; returns its reply, and the ids its model was given and answered with."""
    client, seen = served

    def send(messages, **options):
        before = len(seen.read_text().splitlines()) if seen.exists() else 0
        options = {"temperature": 0, **options}
        reply = client.chat.completions.create(model=str(run / "merged"), messages=messages, **options)
        reply = list(reply) if options.get("stream") else reply
        for _ in range(200):  # a stream ends before `generate` returns
            lines = seen.read_text().splitlines()[before:] if seen.exists() else []
            if lines:
                break
            time.sleep(0.05)
        (line,) = lines
        return reply, *json.loads(line)

    return send


def trained_prompt(messages, tokenizer):
    """The ids before the last answer of a row, as it is trained: all up to the first label."""
    row = get_template("qwen").encode([*messages, {"role": "assistant", "content": "Yes."}], tokenizer)
    answers = sum(message["role"] == "assistant" for message in messages)
    starts = [
        place
        for place, (before, label) in enumerate(zip([-100, *row["labels"]], row["labels"], strict=False))
        if before == -100 and label != -100
    ]
    return row["input_ids"][: starts[answers]]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_server_sees_the_ids_that_were_trained(name, run, ask):
    from transformers import AutoTokenizer

    messages, tokenizer = CONVERSATIONS[name], AutoTokenizer.from_pretrained(run / "base")
    expected = trained_prompt(messages, tokenizer)
    reply, given, _ = ask(messages)
    assert given == expected
    assert reply.usage.prompt_tokens == len(expected)


def test_chat_and_stream_give_the_answer_of_infer_and_end_at_the_stop_token(run, ask, capsys):
    from transformers import AutoTokenizer

    from utils.script import infer

    reply, _, ids = ask(QUESTION)
    chunks, _, streamed = ask(QUESTION, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert reply.choices[0].message.content == text == TAUGHT[0]["output"] == "Yes."
    assert reply.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "stop"
    tokenizer = AutoTokenizer.from_pretrained(run / "merged")
    assert ids == streamed == tokenizer("Yes.<|im_end|>")["input_ids"]
    for folder in ("sft", "merged"):
        capsys.readouterr()
        infer.main(["--model_path", str(run / folder), "--prompt", QUESTION[0]["content"]])
        assert capsys.readouterr().out.strip() == text


@pytest.mark.parametrize("row", TAUGHT)
def test_rows_are_answered_as_they_were_trained(row, ask):
    *messages, answer = to_messages(row)
    reply, _, _ = ask(messages)
    assert reply.choices[0].message.content == answer["content"]


def test_an_answer_that_is_cut_says_so(ask):
    reply, _, ids = ask(to_messages(TAUGHT[2])[:-1], max_tokens=2)
    assert reply.choices[0].finish_reason == "length" and len(ids) == 2


def test_the_page_has_the_commands_that_ran():
    text = (ROOT / "docs" / "after_training.md").read_text(encoding="utf-8")
    assert COMMAND in text and MERGE in text
