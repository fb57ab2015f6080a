"""The command `infer`: one prompt, and what it refuses."""

import json
import shutil

import pytest
import tiny
import torch
from answering import load, printed

from utils.script import infer


def test_a_prompt_gets_the_trained_answer_and_stops(run_folder, capsys):
    for prompt, answer in tiny.LEARNED:
        assert printed(capsys, "--model_path", str(run_folder), "--prompt", prompt) == answer + "\n"


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


def test_an_adapter_and_a_base_with_a_template(trained, tiny_models, capsys):
    folder = trained()
    assert printed(capsys, "--model_path", str(folder), "--prompt", "Hi", "--max_new_tokens", "3")
    base = ["--model_path", tiny_models(), "--prompt", "Hi", "--max_new_tokens", "3"]
    assert printed(capsys, *base, "--template_name", "qwen")


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
    assert printed(capsys, *flags, "--seed", "1") == printed(capsys, *flags, "--seed", "1")


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
def test_refused_flags(refused, flags, told):
    assert told in refused(infer.main, *flags)


def test_a_base_without_a_format_and_an_adapter_whose_base_is_missing(refused, tiny_models, trained, tmp_path):
    assert "--template_name" in refused(infer.main, "--model_path", tiny_models(), "--prompt", "Hi")
    moved = tmp_path / "moved"
    shutil.copytree(trained(), moved)
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone/base"}))
    assert "/gone/base" in refused(infer.main, "--model_path", str(moved), "--prompt", "Hi")
