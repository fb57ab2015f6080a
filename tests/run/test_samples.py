"""The card's answers before and after training: which rows, how they are cut, and at no cost to the run."""

import json
import re
import types
from pathlib import Path

import pytest
import tiny
import torch
from cards import ANSWERS, DPO, FP32, PRETRAIN, answers_of, card_of
from conftest import write_rows

import utils.run.samples
import utils.run.save
from utils.args import CommonArgs
from utils.data.row_types import CONVERSATION, PAIR
from utils.run.samples import split_row


def greedy(folder, adapter, prompt: str) -> str:
    """The answer of plain transformers."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(adapter or folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = GenerationConfig.from_pretrained(adapter or folder)
    model = (
        PeftModel.from_pretrained(model, adapter) if adapter and (adapter / "adapter_config.json").exists() else model
    )
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    stop = {"eos_token_id": config.eos_token_id, "pad_token_id": 0}
    out = model.eval().generate(ids, max_new_tokens=64, do_sample=False, **stop)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


QUICK = ["--num_train_epochs", "10", "--learning_rate", "1e-2"]


@pytest.mark.parametrize(("mode", "more"), [("lora", ()), ("lora", ("--init_lora_weights", "pissa")), ("full", ())])
def test_answers_equal_those_of_the_base_and_of_the_run(train, tiny_models, mode, more):
    folder = train(*FP32, *QUICK, *ANSWERS, "--train_mode", mode, "--train_special_tokens", "off", *more)
    card = card_of(folder)
    before, after, wanted = (answers_of(card, title) for title in ("Before:", "After:", "Wanted:"))
    prompts = [part.split("\n```")[0] for part in card.split("```text\n")[1::4]]
    clean = lambda text: re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\ufffd", text)  # noqa: E731
    assert len(before) == len(after) == len(wanted) == len(prompts) == 3
    assert wanted[0] == tiny.ROWS[0]["output"] and prompts[0].count("<|im_start|>") == 3
    assert prompts[0].endswith("<|im_start|>assistant\n")
    base = tiny_models()
    for prompt, first, last in zip(prompts, before, after, strict=True):
        # the run's own tokenizer and stop tokens, the base's weights
        assert last == clean(greedy(base if mode == "lora" else folder, folder if mode == "lora" else None, prompt))
        assert first == clean(base_answer(base, folder, prompt))
    assert before != after


def base_answer(base, run, prompt: str) -> str:
    """As `greedy`, with the run's stop tokens on the base's weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(run)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    stop = {"eos_token_id": GenerationConfig.from_pretrained(run).eos_token_id, "pad_token_id": 0}
    out = model.generate(ids, max_new_tokens=64, do_sample=False, **stop)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    "flags", [[], ["--train_mode", "full"], ["--lora_dropout", "0.1", "--gradient_checkpointing", "true"]]
)
def test_answers_do_not_change_the_training(train, flags):
    flags = [*FP32, "--logging_steps", "1", *flags]
    with_answers, without = train(*flags, *ANSWERS, output="with"), train(*flags, output="without")
    for name in [path.name for path in with_answers.glob("*.safetensors")] + ["tokenizer_config.json"]:
        assert (with_answers / name).read_bytes() == (without / name).read_bytes()


def test_answers_of_preferences_and_plain_text(train, tmp_path):
    card = card_of(train(*DPO, *ANSWERS, data=write_rows(tmp_path / "pairs.jsonl", tiny.PAIRS), output="dpo"))
    assert answers_of(card, "Wanted:")[0] == "Paris is." and "Pairs" not in card
    # four texts share two packed rows
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in tiny.TEXT[:4]])
    card = card_of(train(*PRETRAIN, *ANSWERS, "--max_len", "64", data=texts, output="pretrain"))
    assert len(answers_of(card, "After:")) == 2 and "none: plain text" in card


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"input_ids": [1, 2, 3, 4, 5, 6], "labels": [-100, -100, 3, 4, -100, 6]}, ([1, 2], [3, 4])),
        ({"input_ids": [1, 2, 3, 9, 8], "labels": [-100, 2, 3, -100, 8], "seq_lengths": [3, 2]}, ([1], [2, 3])),
        ({"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}, ([1], [2])),
        ({"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}, ([1, 2], [3, 4])),
    ],
)
def test_a_row_is_split_into_prompt_and_first_answer(row, parts):
    row_type = PAIR if "prompt_ids" in row else CONVERSATION
    empty = {name: [] for name in row_type.columns}
    assert split_row({**empty, **row}, row_type) == parts


@pytest.mark.parametrize("when", [1, 2])
def test_a_failed_answer_does_not_end_the_run(train, monkeypatch, when):
    calls = []
    answers = utils.run.samples._answers

    def failing(*args):
        calls.append(1)
        if len(calls) == when:
            raise RuntimeError("no memory")
        return answers(*args)

    monkeypatch.setattr(utils.run.samples, "_answers", failing)
    folder = train(*ANSWERS)
    assert "No answers: they could not be made (RuntimeError)." in card_of(folder)
    assert (folder / "train_args.json").exists() and "no memory" in (folder / "train.log").read_text()


def test_partitioned_weights_get_no_answers(monkeypatch):
    monkeypatch.setattr(utils.run.samples, "zero_stage", lambda train_args: 3)
    args = CommonArgs()
    samples, why = utils.run.samples.begin_samples(None, args, types.SimpleNamespace(fsdp=None), None, None)
    assert samples == [] and "ZeRO-3" in why


def test_a_training_says_nothing_of_the_base_s_generation_config(train, tmp_path):
    base = Path(tiny.save_tiny_model(tmp_path / "base"))
    file = base / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"do_sample": True, "temperature": 0.3}))
    folder = train("--max_steps", "1", "--card_samples", "1", model=str(base))
    assert "generation_config" not in (folder / "train.log").read_text(encoding="utf-8")
