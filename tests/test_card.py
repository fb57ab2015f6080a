"""The run card: what it says of a run, and the answers before and after."""

import hashlib
import json
import re
import types

import pytest
import tiny
import torch
from conftest import ROOT, write_rows
from huggingface_hub import ModelCard

import main_train
import utils.samples
import utils.save
from utils.args import CommonArgs, parse_args
from utils.card import _fenced, _front_matter, _table, card_text, changed_settings, is_own_card, write_card
from utils.samples import Sample, split_row

FP32 = ["--precision", "fp32"]
DPO = ["--train_args_path", "train_args/dpo/base.py"]
PRETRAIN = ["--train_args_path", "train_args/pretrain/base.py"]


def card_of(folder) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def rows_of(card: str) -> dict[str, str]:
    """The two-column tables of a card."""
    cells = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ")]
    return {row[0]: row[1] for row in cells if len(row) == 2}


def answers_of(card: str, title: str) -> list[str]:
    """The fenced texts under `Before:`, say."""
    found = card.split(f"{title}\n\n```text\n")[1:]
    return [text.split("\n```")[0] for text in found]


# ---------------------------------------------------------------------- what it says
def test_the_card_of_a_run(train, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    rows = write_rows(tmp_path / "some rows.jsonl", [*tiny.ROWS, {"instruction": "Nothing?", "output": ""}])
    folder = train(*FP32, "--val_size", "2", "--lora_rank", "4", "--hub_token", "hf_given", data=rows)
    card, record = card_of(folder), json.loads((folder / "train_args.json").read_text())
    data = ModelCard(card).data
    assert (data.library_name, data.tags) == ("peft", ["llm-dojo", "trl", "sft", "lora"]) and data.base_model is None
    told, summary = rows_of(card), record["summary"]
    assert told["training loss"] == f"{summary['first_loss']:.4f} at first, {summary['last_loss']:.4f} at last"
    assert f"{summary['eval_loss']:.4f} at last" in told["evaluation loss"]
    assert told["steps"] == "4" and told["chat template"] == "`qwen`" and told["precision"] == "fp32"
    assert record["base"]["fingerprint"] in told["base"] and record["base"]["path"] in told["base"]
    assert "| training | 9 | 8 | 1 with nothing to train |" in card
    assert "| evaluation | – | 2, held back of the training rows |" in card
    sha = hashlib.sha256((tmp_path / "some rows.jsonl").read_bytes()).hexdigest()
    assert f"| `{rows}` | {(tmp_path / 'some rows.jsonl').stat().st_size:,} | `{sha}` |" in card
    assert told["lora_rank"] == "4 (default: 16)" and "lora_rank 4, lora_alpha 32" in told["adapter"]
    assert f"torch {torch.__version__}" in told["libraries"] and "cores" in told["processor"]
    assert told["GPUs"] == "none" and told["processes"] == "1" and "tokens seen" in told and "training time" in told
    assert f"python main_train.py --config {folder}/train_args.json" in card
    assert "hf_" not in card + json.dumps(record)
    assert record["data"]["train"]["files"][0]["sha256"] == sha


def test_a_base_of_the_hub_is_named_and_a_folder_is_not(tiny_models):
    common = {"model_name_or_path": "Qwen/Qwen1.5-7B", "train_mode": "full", "task_type": "dpo_multi"}
    data = ModelCard(_front_matter(common) + "\n").data
    assert (data.base_model, data.library_name, data.tags[2]) == ("Qwen/Qwen1.5-7B", "transformers", "dpo")
    assert ModelCard(_front_matter({**common, "model_name_or_path": "data/tiny_model"}) + "\n").data.base_model is None
    assert ModelCard(_front_matter({**common, "model_name_or_path": tiny_models()}) + "\n").data.base_model is None


@pytest.mark.parametrize("recipe", sorted(str(p.relative_to(ROOT)) for p in (ROOT / "train_args").glob("*/*.py")))
def test_a_run_by_defaults_has_no_settings_that_differ(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args, train_args = parse_args(["--train_args_path", recipe])
    assert changed_settings(args, train_args) == {}
    flags = ["--learning_rate", "7e-5", "--use_dora", "true", "--max_len", "77", "--hub_token", "hf_secret"]
    changed = changed_settings(*parse_args(["--train_args_path", recipe, *flags]))
    assert set(changed) == {"learning_rate", "use_dora", "max_len"} and changed["max_len"] == (1024, 77)


def test_texts_cannot_break_the_card(train):
    folder = train("--max_steps", "1", "--card_samples", "0")
    record = json.loads((folder / "train_args.json").read_text())
    assert "none were asked for" in card_of(folder)
    sample = Sample([1], "````\n# not a title", "a", "```", "b")
    card = card_text(record, [], {"name": ("a|b", None)}, [sample], "", "run")
    assert "`````text\n````\n# not a title\n`````" in card and "````text\n```\n````" in card
    assert _fenced("a\x00\x1b[1m\n\tb") == "```text\na\ufffd\ufffd[1m\n\tb\n```"
    assert "| x | a&#124;b |" in _table([("x", "a|b")])


# ---------------------------------------------------------------------- a README.md of the user's own
def test_a_readme_of_ones_own_is_not_written_over(train, refused, tmp_path, tiny_models, rows_file):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "README.md").write_text("precious")
    flags = ["--model_name_or_path", tiny_models(), "--train_data_path", rows_file, "--output_dir", str(folder)]
    assert "already holds 'README.md'" in refused(main_train.main, *flags)
    train("--overwrite_output_dir", "true", "--max_steps", "1")
    assert (folder / "README.md").read_text() == "precious"
    assert is_own_card(folder / "run_card.md")


def test_a_card_of_an_earlier_run_is_replaced(tmp_path, train):
    folder = train("--max_steps", "1", "--card_samples", "0")
    before = card_of(folder)
    train("--max_steps", "2", "--card_samples", "0", "--overwrite_output_dir", "true")
    assert card_of(folder) != before and "| steps | 2 |" in card_of(folder)
    assert not (folder / "run_card.md").exists()
    assert write_card(folder, "mine") == folder / "README.md"


# ---------------------------------------------------------------------- before and after
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


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_answers_are_those_of_the_base_and_of_the_run(train, tiny_models, mode):
    folder = train(*FP32, *QUICK, "--train_mode", mode, "--train_special_tokens", "off")
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
def test_answers_change_nothing_of_the_training(train, flags):
    flags = [*FP32, "--logging_steps", "1", *flags]
    with_answers, without = train(*flags, output="with"), train(*flags, "--card_samples", "0", output="without")
    for name in [path.name for path in with_answers.glob("*.safetensors")] + ["tokenizer_config.json"]:
        assert (with_answers / name).read_bytes() == (without / name).read_bytes()


def test_preferences_and_plain_text_have_answers_too(train, tmp_path):
    card = card_of(train(*DPO, data=write_rows(tmp_path / "pairs.jsonl", tiny.PAIRS), output="dpo"))
    assert answers_of(card, "Wanted:")[0] == "Paris is." and "Pairs" not in card
    # four texts share two packed rows
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in tiny.TEXT[:4]])
    card = card_of(train(*PRETRAIN, "--max_len", "64", data=texts, output="pretrain"))
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
def test_where_a_row_is_cut(row, parts):
    assert split_row(row) == parts


@pytest.mark.parametrize("when", [1, 2])
def test_answers_that_fail_cost_no_run(train, monkeypatch, when):
    calls = []
    answers = utils.samples._answers

    def failing(*args):
        calls.append(1)
        if len(calls) == when:
            raise RuntimeError("no memory")
        return answers(*args)

    monkeypatch.setattr(utils.samples, "_answers", failing)
    folder = train()
    assert "No answers: they could not be made (RuntimeError)." in card_of(folder)
    assert (folder / "train_args.json").exists() and "no memory" in (folder / "train.log").read_text()


def test_a_card_that_fails_costs_no_run(train, monkeypatch):
    def fail(*args):
        raise KeyError("told")

    monkeypatch.setattr(utils.save, "card_text", fail)
    folder = train("--max_steps", "1")
    assert (folder / "train_args.json").exists() and not (folder / "README.md").exists()
    assert "the run's card cannot be written" in (folder / "train.log").read_text()


def test_divided_weights_are_not_asked(monkeypatch):
    monkeypatch.setattr(utils.samples, "zero_stage", lambda train_args: 3)
    args = CommonArgs()
    samples, why = utils.samples.begin_samples(None, args, types.SimpleNamespace(fsdp=None), None, None)
    assert samples == [] and "ZeRO-3" in why


def test_the_card_is_pushed_with_what_the_push_of_the_weights_lacked(monkeypatch, tmp_path):
    pushed = {}
    monkeypatch.setattr("huggingface_hub.upload_folder", lambda **options: pushed.update(options))
    options = types.SimpleNamespace(hub_token="hf_x", hub_revision=None)
    utils.save.push_card(types.SimpleNamespace(hub_model_id="me/run", args=options), tmp_path)
    assert pushed["repo_id"] == "me/run" and "README.md" in pushed["allow_patterns"]

    def fail(**options):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.upload_folder", fail)
    utils.save.push_card(types.SimpleNamespace(hub_model_id="me/run", args=options), tmp_path)
