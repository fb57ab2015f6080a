"""Findings on rows: their lines and counts, how severe they are, and what repeats or does not fit."""

import json

import pytest
import tiny
from doctor_case import CHINESE, CLEAN, CLEAN_PAIRS, LONG, clean_and, with_a_broken_line

from utils.template import get_template


def test_findings_name_lines_and_counts(case, report):
    rows = clean_and(output="") + [{"instruction": 7, "output": "x"}, {"instruction": "Hi", "output": "Caf\ufffd"}]
    code, said = report(*case.flags(rows=[*rows, {"instruction": "Go\u202e", "output": "No"}]))
    assert code == 2
    assert {f["code"]: [(p["count"], p["lines"]) for p in f["places"]] for f in said["findings"]} == {
        "ROW_UNREADABLE": [(1, [42])],
        "ROW_NOTHING_TRAINED": [(1, [41])],
        "UNICODE_BROKEN": [(1, [43])],
        "INVISIBLE_CHARACTERS": [(1, [44])],
    }
    assert said["findings"][0]["places"][0]["file"] == str(case.folder / "rows.jsonl")


@pytest.mark.parametrize("more", [[], ["--template_name", "none"]], ids=["prepared", "read alone"])
def test_broken_unicode_is_not_counted_as_unreadable(case, report, more):
    """Also where the rows are not prepared, since a flag cannot be used."""
    flags = with_a_broken_line(case)
    with open(case.folder / "rows.jsonl", "ab") as file:
        file.write(b'{"instruction": "caf\xe9", "output": "b"}\n{"instruction": "a", "output": "\\ud800"}\n')
    _, said = report(*flags, *more, "--on_bad_row", "drop")
    places = {finding["code"]: finding["places"][0]["lines"] for finding in said["findings"] if finding["places"]}
    line = len(CLEAN) + 1
    assert (places["ROW_UNREADABLE"], places["UNICODE_BROKEN"]) == ([line], [line + 1, line + 2])


def test_on_bad_row_decides_the_severity(case, report):
    flags = case.flags(rows=clean_and(output=""))
    assert [report(*flags, "--on_bad_row", choice)[0] for choice in ("auto", "drop", "error")] == [1, 1, 2]
    flags = with_a_broken_line(case)
    assert [report(*flags, "--on_bad_row", choice)[0] for choice in ("auto", "drop")] == [2, 1]


def test_a_truncated_file_is_one_finding(case, report):
    file = case.folder / "cut.json"
    file.write_text(json.dumps(CLEAN)[:-9])
    code, said = report(*case.flags("--train_data_path", str(file)))
    assert (code, [f["code"] for f in said["findings"]]) == (2, ["ROW_UNREADABLE"])


@pytest.mark.parametrize(
    ("rows", "flags", "code"),
    [
        ([{"instruction": "Hi", "output": ""}], (), "ROW_NOTHING_TRAINED"),
        ([{"prompt": "Hi", "chosen": "a", "rejected": "b"}], ("--on_bad_row", "drop"), "ROW_UNREADABLE"),
        ([{"instruction": "Hi", "output": LONG}], ("--max_len", "50"), "ROW_TOO_LONG"),
        ([{"messages": [{"role": "user", "content": "Hi"}] * 2 + [{"role": "assistant", "content": "Ho"}]}],
         ("--template_name", "mistral"), "ROW_UNREADABLE"),
        ([], (), "ROW_NOTHING_TRAINED"),
    ],
)  # fmt: skip
def test_no_usable_row_is_an_error(case, report, rows, flags, code):
    model = case.model(lambda: tiny.tokenizer_for(get_template("mistral"), tiny.byte_level_tokenizer))
    exit_code, said = report(*case.flags(*flags, rows=rows, model=model))
    assert [(f["code"], f["severity"]) for f in said["findings"]] == [(code, "error")]
    assert exit_code == 2


def test_validation_rows_that_repeat_training_rows(case, report):
    said = report(*case.flags("--val_size", "20", rows=[*CLEAN, *CLEAN]))[1]
    assert "EVAL_IN_TRAIN" in {finding["code"] for finding in said["findings"]}


@pytest.mark.parametrize("task", ["sft", "pretrain", "dpo"])
def test_the_length_of_rows_that_do_not_fit(case, report, tokenizer, task):
    """The figures are those of the tokenizer on the whole row."""
    template = get_template("qwen", tokenizer)
    row = {"sft": clean_and(output=LONG)[-1], "pretrain": {"text": LONG},
           "dpo": {"prompt": "Say hello.", "chosen": LONG, "rejected": "No."}}[task]  # fmt: skip
    messages = [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": LONG}]
    text = LONG + tokenizer.eos_token if task == "pretrain" else template.render(messages)
    wanted = len(tokenizer(text)["input_ids"])
    recipe = ("--train_args_path", f"train_args/{task}/base.py", *(("--packing", "false") if task != "dpo" else ()))
    clean = {"sft": CLEAN, "pretrain": [{"text": r["output"]} for r in CLEAN], "dpo": CLEAN_PAIRS}[task]
    said = report(*case.flags(*recipe, "--max_len", "100", rows=[*clean, row]))[1]
    message = next(f["message"] for f in said["findings"] if f["code"] == "ROW_TOO_LONG")
    assert f"1 of them measured: {wanted} to {wanted} tokens" in message


def test_a_question_in_both_splits_with_different_answers(case, report):
    other = case.write([{**CLEAN[3], "output": "I do not know."}, *clean_and()[-1:]], "eval.jsonl")
    (finding,) = report(*case.flags("--eval_data_path", other))[1]["findings"]
    begins = "1 row of 2 for validation have a question that is in the training rows too, 0 with"
    assert finding["message"].startswith(begins)
    assert finding["places"] == [{"file": other, "count": 1, "lines": [1]}]


def test_latin_rows_are_not_stray(case, report):
    """Code, names and formulas are Latin in every corpus."""
    rows = [{**row, "instruction": f"第{i}题：{row['instruction']}"} for i in range(5) for row in CHINESE]
    assert report(*case.flags(rows=[*rows, CLEAN[0]]))[1]["findings"] == []
