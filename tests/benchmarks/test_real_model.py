"""The benchmark on a real model: its rows, both programs' words, and scores that are those of plain transformers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import real_model, real_score
from benchmarks.peers import Work
from benchmarks.peers import write_rows as write_for_programs
from benchmarks.real_model import CASES, PROGRAMS, RATES, Tuning
from benchmarks.tables import table_in
from utils.runtime.errors import UserError
from utils.template import get_template

ROWS = [{"instruction": f"Say {word}.", "output": word} for word in ("yes", "no", "hello to all", "one two", "three")]
CONVERSATION = [
    {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Goodbye, and thank you."},
]  # fmt: skip


@pytest.fixture
def base(tiny_models, tmp_path):
    """A tiny model with a chat template."""
    folder = Path(shutil.copytree(tiny_models(), tmp_path / "base"))
    (folder / "chat_template.jinja").write_text(get_template("qwen").to_jinja(), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("answer", "right"),
    [("27 + 48 = 75.", True), ("75", True), ("It is 175.", False), ("75.5", False), ("0.75", False), ("7, 5", False)],
)
def test_a_right_answer_holds_the_number_alone(answer, right):
    assert real_score.is_right(answer, "75") is right


def test_the_questions_have_answers_of_their_own():
    assert len(real_score.sums()) == 30 and len(real_score.capitals()) == 20
    assert all(eval(sum_[len("What is ") : -1]) == int(result) for sum_, result in real_score.sums().items())
    assert not {*real_score.sums(), *real_score.capitals()} & {*real_score.QUESTIONS}


def test_rows_are_drawn_by_the_seed_and_none_is_trained_and_held_back(base, tmp_path):
    rows = [*ROWS, {"instruction": "Be silent.", "output": ""}, {"instruction": "Talk.", "output": "on and on " * 300}]
    file, tokenizer = write_rows(tmp_path / "rows.jsonl", rows), AutoTokenizer.from_pretrained(base)
    about, training, held_back = real_model.choose(Path(file), tokenizer, 3, 2, seed=1)
    assert sorted(about["training"] + about["held_back"]) == [1, 2, 3, 4, 5]
    assert training == [rows[line - 1] for line in about["training"]]
    assert [messages[-1]["content"] for messages in held_back] == [rows[n - 1]["output"] for n in about["held_back"]]
    assert real_model.choose(Path(file), tokenizer, 3, 2, seed=1)[0] == about
    assert any(real_model.choose(Path(file), tokenizer, 3, 2, seed=s)[0] != about for s in (2, 3, 4))
    with pytest.raises(UserError, match="has 5 rows"):
        real_model.choose(Path(file), tokenizer, 4, 2, seed=1)


@pytest.mark.parametrize("mode", RATES)
def test_both_programs_are_given_the_same_work(mode, base, tmp_path):
    from trl.scripts.sft import make_parser

    from utils.args import parse_args

    work = Work(base, write_for_programs(tmp_path / "rows", ROWS, ()), max_len=real_model.MAX_LEN)
    words = {short: Tuning(name, Path("python"), mode=mode).command(work, tmp_path / "run")[1:]
             for short, name in PROGRAMS.items()}  # fmt: skip
    common, ours = parse_args(words["ours"][1:])
    data, theirs, model, _ = make_parser().parse_args_into_dataclasses(words["trl"][2:])
    for name in ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "lr_scheduler_type", "seed",
                 "warmup_steps", "weight_decay", "max_grad_norm", "bf16", "gradient_accumulation_steps"):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name), name
    assert (common.max_len, common.train_mode == "full") == (theirs.max_length, not model.use_peft)
    assert (common.train_mode == "qlora", common.use_dora) == (model.load_in_4bit, model.use_dora)
    assert (common.lora_rank, common.lora_alpha) == (model.lora_r, model.lora_alpha)
    pair = json.loads((work.data / "trl" / "train.jsonl").read_text().splitlines()[0])
    assert [turn["role"] for turn in pair["prompt"] + pair["completion"]] == ["user", "assistant"]


def test_the_loss_is_that_of_transformers_and_covers_the_last_answer_with_its_stop(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    row, model = real_score.encode(tokenizer, CONVERSATION), real_score.load(base, base)
    assert tokenizer.decode(row.answer) == "Goodbye, and thank you.<|im_end|>"
    ids = torch.tensor([row.prompt + row.answer])
    labels = torch.tensor([[-100] * len(row.prompt) + row.answer])
    expected = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(ids, labels=labels).loss
    assert real_score.mean_loss(model, [row]) == pytest.approx(float(expected), rel=1e-6)
    short = real_score.encode(tokenizer, CONVERSATION[:2])
    tokens = [len(row.answer), len(short.answer)]
    each = [real_score.mean_loss(model, [one]) for one in (row, short)]
    both = (each[0] * tokens[0] + each[1] * tokens[1]) / sum(tokens)
    assert real_score.mean_loss(model, [row, short]) == pytest.approx(both, rel=1e-6)


def test_answers_in_batches_are_those_of_each_prompt_alone(base, monkeypatch):
    tokenizer, model = AutoTokenizer.from_pretrained(base), real_score.load(base, base)
    prompts = [real_score.encode(tokenizer, CONVERSATION[:count]).prompt for count in (2, 4)]
    prompts.append(tokenizer("The quick")["input_ids"])
    together = real_score.answers(model, tokenizer, prompts, 6)
    monkeypatch.setattr(real_score, "BATCH", 1)
    assert together == real_score.answers(model, tokenizer, prompts, 6)
    for prompt, answer in zip(prompts, together, strict=True):
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(dim=1).tolist() == answer and 1 <= len(answer) <= 6


def test_results_are_kept_and_those_of_other_conditions_are_refused(base, tmp_path, monkeypatch, capsys):
    ran = []

    def run(program, work, scratch, threads):
        ran.append(program.mode)
        shutil.copytree(base, scratch / "out" / "run", dirs_exist_ok=True)
        return {"first_step": 1.0, "training": 2.0, "steps": 1, "peak": 3e9, "whole": 4.0}

    monkeypatch.setattr(real_model, "run", run)
    monkeypatch.setattr(real_score, "score", lambda *_: {"loss": 1.5, "rouge_l": 20.0, "answer_tokens": 9.0, "ended": 1,
                                                         "sums": 2, "capitals": 3, "answers": {}})  # fmt: skip
    flags = ["--rows", write_rows(tmp_path / "rows.jsonl", ROWS), "--model", str(base), "--training", "2",
             "--held_back", "1", "--folder", str(tmp_path / "work"), "--output", str(tmp_path / "r.json")]  # fmt: skip
    real_model.main([*flags, "--cases", "ours:lora"])
    real_model.main([*flags, "--cases", "ours:lora", "ours:full"])
    assert ran == ["lora", "full"]
    kept = json.loads((tmp_path / "r.json").read_text())
    assert [one["mode"] for one in kept["runs"]] == ["lora", "full"] and len(kept["rows"]["sha256"]) == 64
    table = capsys.readouterr().out
    assert "| LoRA | LLM-Dojo | 1.500 | 20.0 | 9 | 1 | 2 | 3 | 2 s, 3.0 GB |" in table
    assert "| QLoRA | LLM-Dojo | not measured | | | | | | |" in table
    with pytest.raises(UserError, match="other rows and settings"):
        real_model.main([*flags, "--seed", "1"])


def test_an_answer_is_one_cell_of_a_table():
    assert real_model._cell("a | b\n\nc") == "a \\| b / c"
    assert len(real_model._cell("long " * 100)) <= real_model.SHOWN + 2


def test_bad_flags_are_reported_all_at_once(tmp_path):
    with pytest.raises(UserError) as error:
        real_model.parse(["--cases", "our:lora", "--training", "0", "--rows", str(tmp_path / "none.jsonl")])
    for part in ("--training 0", "Did you mean 'ours:lora'", "none.jsonl' is no file"):
        assert part in str(error.value)


def test_the_tables_on_the_pages_are_those_of_the_results():
    results = json.loads(real_model.RESULTS.read_text(encoding="utf-8"))
    assert {real_model.case_of(one) for one in results["runs"]} <= {*CASES}
    for page in real_model.PAGES:
        translate = real_model.in_chinese if "/zh/" in page else str
        assert table_in(ROOT / page, real_model.MARK) == translate(real_model.table(results)), page
    for page in real_model.PAGES[:2]:
        translate = real_model.in_chinese if "/zh/" in page else str
        assert table_in(ROOT / page, f"{real_model.MARK}, answers") == translate(real_model.answers_table(results))
