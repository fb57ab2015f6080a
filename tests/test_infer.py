"""Talking to a run: the ids it sees, where it stops, several turns, and what is refused."""

import io
import json
import shutil

import pytest
import torch

from utils.script import infer
from utils.trained import check_trained


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, request):
    """A run that knows its rows by heart: a tiny random model, trained long enough on three rows."""
    import tiny
    from conftest import write_rows

    import main_train

    folder = tmp_path_factory.mktemp("infer")
    rows = [{"instruction": q, "output": a} for q, a in [("Hi", "Hello!"), ("Who?", "The fox."), ("再见", "好。")]]
    main_train.main(
        [
            "--model_name_or_path", tiny.save_tiny_model(folder / "base"),
            "--train_data_path", write_rows(folder / "rows.jsonl", rows), "--output_dir", str(folder / "run"),
            "--num_train_epochs", "60", "--learning_rate", "3e-3", "--report_to", "none",
            "--train_mode", "full", "--save_strategy", "no",
            "--disable_tqdm", "true", "--precision", "fp32",
        ]
    )  # fmt: skip
    return folder / "run"


def load(**values):
    args = infer.InferArgs(**values)
    return infer.load_chat(args, check_trained(args)[0])


def said(capsys, *flags):
    capsys.readouterr()
    infer.main(list(flags))
    return capsys.readouterr().out


def test_a_prompt_is_answered_as_trained_and_stops(run_folder, capsys):
    for prompt, answer in [("Hi", "Hello!"), ("Who?", "The fox."), ("再见", "好。")]:
        assert said(capsys, "--model_path", str(run_folder), "--prompt", prompt) == answer + "\n"


def test_the_model_sees_the_ids_it_was_trained_on(run_folder, monkeypatch):
    """The prompt's ids are the beginning of the training row's, to the token before the answer."""
    from transformers import AutoTokenizer

    from utils.template import get_template

    chat = load(model_path=str(run_folder))
    seen = []
    generate = chat.model.generate
    monkeypatch.setattr(chat.model, "generate", lambda ids, **options: (seen.append(ids), generate(ids, **options))[1])
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
