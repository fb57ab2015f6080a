"""The command `evaluate`: a run beside its base, the files it writes, and what it refuses."""

import json
import math

import pytest
import tiny
from conftest import write_rows
from quiz import QUIZ, evaluate_rows

from utils.script import evaluate


def test_answers_of_a_run_beside_its_base(run_folder, tmp_path, capsys):
    from sacrebleu import corpus_chrf

    rows = [
        {"instruction": "Hi", "output": "Hello!"},
        {"instruction": "Who?"},
        {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "The fox."}]},
        {"instruction": "Who? " * 600, "output": "x"},
        {"instruction": "再见", "output": "好！"},
        {"notes": "?"},
        {"instruction": "Who? " * 9, "output": "The fox, the fox."},  # the longest prompt is answered first
    ]
    lines, summary, out, err = evaluate_rows(tmp_path, capsys, run_folder, rows, "--max_new_tokens", "8")
    assert [line["line"] for line in lines] == [1, 3, 5, 7]
    *lines, last = lines
    assert [line["answers"]["trained"] for line in lines] == ["Hello!", "The fox.", "好。"]
    assert lines[1]["question"] == "Who?" and lines[1]["reference"] == "The fox."
    assert lines[0]["scores"]["trained"] == dict.fromkeys(["exact", "normalised", "bleu", "chrf", "rouge_l"], 100)
    assert lines[2]["scores"]["trained"]["exact"] == 0 and lines[2]["scores"]["trained"]["normalised"] == 100
    assert all(line["scores"]["base"]["exact"] == 0 for line in lines)
    assert all(line["answers"]["base"] != line["answers"]["trained"] for line in lines)
    table = {cells[1].strip(): cells[2:-1] for cells in (line.split("|") for line in out.splitlines())}
    assert [cell.strip() for cell in table["0 to 100"]] == ["n", "base", "trained", "difference"]
    assert [cell.strip() for cell in table["exact match"]] == ["4", "0.00", "50.00", "+50.00"]
    assert table["BLEU, by word (13a)"][0].strip() == "3"
    assert table["BLEU, Chinese by character (zh)"][0].strip() == "1"
    assert summary["figures"]["trained"]["exact"] == {"value": 50, "rows": 4}
    pairs = [(line["answers"]["trained"], line["reference"]) for line in [*lines, last]]
    whole = corpus_chrf([answer for answer, _ in pairs], [[reference for _, reference in pairs]]).score
    assert summary["figures"]["trained"]["chrf"] == {"value": pytest.approx(whole, abs=1e-4), "rows": 4}
    assert summary["rows"] == 4 and summary["models"]["base"]["base"] == str(run_folder.parent / "base")
    told = "\n".join(summary["skipped"])
    assert len(summary["skipped"]) == 3 and "3 rows cannot be evaluated and are skipped" in err
    for text in (
        "asked.jsonl:2 has no answer to compare with",
        "asked.jsonl:4 the prompt has",
        "asked.jsonl:6 has the",
    ):
        assert text in told and text in err


def test_choices_of_a_run_and_its_base(run_folder, tmp_path, capsys):
    rows = [
        {"question": question, "choices": [answer for _, answer in tiny.LEARNED], "answer": answer}
        for question, answer in tiny.LEARNED
    ]
    lines, summary, out, err = evaluate_rows(
        tmp_path, capsys, run_folder, [*rows, {"question": "Who?", "choices": ["x"]}]
    )
    assert [line["scores"]["trained"]["chosen"] for line in lines] == ["A", "B", "C"]
    assert all(line["scores"]["trained"]["right"] for line in lines)
    assert lines[0]["answer"] == "A" and lines[0]["choices"]["B"] == "The fox."
    scores = lines[1]["scores"]["trained"]
    assert scores["log_likelihood_per_byte"][2] == pytest.approx(scores["log_likelihood"][2] / 6, abs=1e-5)
    assert math.exp(scores["log_likelihood"][1]) > 1 / 3  # the answer that it gives
    assert summary["figures"]["trained"]["accuracy"]["value"] == 100
    assert summary["figures"]["base"]["accuracy"]["value"] < 100
    assert "(guessing)" in out and "33.33" in out and "asked.jsonl:4 has no field 'answer'" in err
    letters = evaluate_rows(
        tmp_path, capsys, run_folder, rows, "--choice_form", "letter", "--overwrite", "true", "--compare_base", "false"
    )
    assert list(letters[1]["figures"]) == ["model"] and "accuracy_per_byte" not in letters[1]["figures"]["model"]


def test_the_base_of_an_adapter_answers_as_in_infer(train, tiny_models, tmp_path, capsys):
    from utils.script import infer

    folder = train("--learning_rate", "1e-2", "--num_train_epochs", "8")
    rows = [{"instruction": "The dog?", "output": "The lazy dog."}, {"instruction": "Count.", "output": "1 2 3"}]
    lines, summary, _, err = evaluate_rows(
        tmp_path, capsys, folder, rows, "--max_new_tokens", "6", "--dtype", "float32"
    )
    assert "that of the trained model is used" in err
    assert summary["models"] == {
        "base": {"base": tiny_models(), "adapters": []},
        "trained": {"base": tiny_models(), "adapters": [str(folder)]},
    }
    assert any(line["answers"]["base"] != line["answers"]["trained"] for line in lines)
    both = {
        "trained": ["--model_path", str(folder)],
        "base": ["--model_path", tiny_models(), "--template_name", "qwen"],
    }
    for name, flags in both.items():
        for line in lines:
            prompt = ["--prompt", line["question"], "--max_new_tokens", "6", "--dtype", "float32"]
            infer.main([*flags, *prompt])
            assert capsys.readouterr().out == line["answers"][name] + "\n"


def test_a_single_model_without_a_format_gets_plain_text(tiny_models, tmp_path, capsys):
    lines, summary, out, err = evaluate_rows(tmp_path, capsys, tiny_models(), QUIZ, "--max_rows", "2")
    assert len(lines) == 2 and list(summary["figures"]) == ["model"] and "difference" not in out
    assert "template 'default'" in err and "does not say what it was trained on" in err


def test_an_existing_file_is_replaced_only_with_overwrite(tiny_models, refused, tmp_path):
    data, output = write_rows(tmp_path / "asked.jsonl", QUIZ), tmp_path / "eval.jsonl"
    flags = ["--model_path", tiny_models(), "--eval_data_path", data, "--output", str(output)]
    output.write_text("mine")
    said = refused(evaluate.main, *flags)
    assert str(output) in said and "--overwrite true" in said and output.read_text() == "mine"
    evaluate.main([*flags, "--overwrite", "true"])
    assert len(output.read_text(encoding="utf-8").splitlines()) == 3
    output.unlink()
    assert "eval.summary.json' exists" in refused(evaluate.main, *flags)
    said = refused(evaluate.main, *flags[:4], "--output", data)
    assert "is one of the files of --eval_data_path" in said


@pytest.mark.parametrize(("rows", "flags", "told"), [
    ([*QUIZ, {"instruction": "Hi", "output": "Hello"}], [], "asked.jsonl:4 has none; evaluate them separately"),
    (QUIZ, ["--do_sample", "true", "--metrics", "exact"], "--do_sample True has no effect on rows with choices"),
    ([{"instruction": "Hi", "output": "Hello"}], ["--choice_form", "letter"], "letter has no effect on rows to"),
    ([{"instruction": "Hi"}], [], "no row of --eval_data_path"),
    (QUIZ, ["--metrics", "blue", "--batch_size", "0", "--max_rows", "0"], "4 errors"),
    (QUIZ, ["--compare_base", "true"], "does not say what it was trained on"),
    (QUIZ, ["--choice_form", "leter"], "Did you mean 'letter'"),
])  # fmt: skip
def test_refused_rows_and_flags(tiny_models, refused, tmp_path, rows, flags, told):
    data = write_rows(tmp_path / "asked.jsonl", rows)
    output = str(tmp_path / ("eval.json" if told == "4 errors" else "eval.jsonl"))
    said = refused(evaluate.main, "--model_path", tiny_models(), "--eval_data_path", data, "--output", output, *flags)
    assert told in said


def test_missing_flags(refused):
    said = refused(evaluate.main)
    assert all(f"--{name} is missing" in said for name in ("model_path", "eval_data_path", "output"))


def test_a_base_that_is_missing_or_has_other_weights(run_folder, refused, tmp_path, tiny_models):
    import shutil

    data = write_rows(tmp_path / "asked.jsonl", QUIZ)
    copied = tmp_path / "run"
    shutil.copytree(run_folder, copied)
    file = copied / "train_args.json"
    noted = json.loads(file.read_text(encoding="utf-8"))
    flags = ["--model_path", str(copied), "--eval_data_path", data, "--output", str(tmp_path / "eval.jsonl")]
    file.write_text(json.dumps(noted | {"base": {**noted["base"], "path": "/gone/base"}}))
    said = refused(evaluate.main, *flags, "--compare_base", "true")
    assert "'/gone/base'" in said and "--base_model" in said and "--compare_base false" in said
    evaluate.main(flags)  # without the flag it is told, and left out
    assert list(json.loads((tmp_path / "eval.summary.json").read_text())["figures"]) == ["model"]
    again = [*flags, "--overwrite", "true", "--max_rows", "1"]
    evaluate.main([*again, "--base_model", str(run_folder.parent / "base")])
    assert list(json.loads((tmp_path / "eval.summary.json").read_text())["figures"]) == ["base", "trained"]
    said = refused(evaluate.main, *again, "--base_model", "/gone/base")
    last = said.strip().splitlines()[-1]  # what was told before is there as well
    assert "--base_model '/gone/base' does not exist" in last and "--compare_base false" not in last
    other = tiny_models(hidden_size=32)
    said = refused(evaluate.main, *again, "--base_model", other)
    assert noted["base"]["fingerprint"] in said and other in said and "--allow_other_base" in said
