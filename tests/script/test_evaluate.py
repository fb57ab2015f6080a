"""The command that evaluates: likelihoods against a plain reference, a whole run with its base, and what is refused."""

import copy
import json
import math

import pytest
import tiny
import torch
from conftest import ROOT, write_rows

from utils.data.bad_rows import BadRow
from utils.data.files import RawRow
from utils.evaluate import metrics
from utils.evaluate.methods import MultipleChoice, share_right
from utils.evaluate.models import EvalModel, check_eval_models, load_eval_models
from utils.evaluate.multiple_choice import encode_choices, log_likelihoods, read_choices
from utils.model.tokenizer import apply_chat_format
from utils.script import evaluate
from utils.template import get_template, template_dict

QUIZ = [
    {"question": "What is the capital of France?", "choices": ["Paris.", "The lazy dog jumps."], "answer": "Paris."},
    {"question": "你是谁？", "choices": ["我是一个人工智能助手。", "好", "the fox <|im_end|> over"], "answer": 1},
    {"question": "1 + 2 =", "choices": {"A": "3", "B": "10 - 4"}, "answer": "b", "system": "Be brief."},
]


def run(tmp_path, capsys, model, rows, *flags):
    """Runs the command; returns the lines, the summary, and what it said on stdout and stderr."""
    data, output = write_rows(tmp_path / "asked.jsonl", rows), tmp_path / "out" / "eval.jsonl"
    capsys.readouterr()
    evaluate.main(["--model_path", str(model), "--eval_data_path", data, "--output", str(output), *flags])
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    summary = json.loads((tmp_path / "out" / "eval.summary.json").read_text(encoding="utf-8"))
    assert sorted(path.name for path in output.parent.iterdir()) == ["eval.jsonl", "eval.summary.json"]
    return lines, summary, *capsys.readouterr()


def choices_of(*rows):
    return [read_choices(RawRow("rows.jsonl", line, row)) for line, row in enumerate(rows, 1)]


def speaking(tokenizer, name="qwen"):
    tokenizer = copy.deepcopy(tokenizer)
    apply_chat_format(tokenizer, get_template(name, tokenizer))
    return tokenizer


# ------------------------------------------------------------------------------ the likelihood of a choice


@pytest.mark.parametrize("architecture", ["qwen2", "gemma"])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_likelihoods_equal_a_softmax_row_by_row(tiny_models, tokenizer, architecture, batch_size):
    """Against each sequence alone, without padding, and the whole softmax in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_models(architecture), dtype=torch.float32).eval()
    # a random model's logits hardly differ; these do
    model.get_output_embeddings().weight.data.mul_(8)
    tokenizer = speaking(tokenizer)
    rows = choices_of(*QUIZ)
    scored = [one for row in rows for one in encode_choices(row, tokenizer)]
    found = dict(log_likelihoods(model, scored, batch_size, tokenizer.pad_token_id))
    place = 0
    for row in rows:
        for text in row.texts:
            prompt = tokenizer.apply_chat_template(row.messages, add_generation_prompt=True)["input_ids"]
            # behind a line feed, as in the format; a special token's text is no special token
            said = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            ids = torch.tensor([[*prompt, *said]])
            with torch.no_grad():
                probabilities = model(ids).logits[0].double().softmax(-1)
            by_hand = sum(math.log(probabilities[at - 1, ids[0, at]]) for at in range(len(prompt), ids.shape[1]))
            if "<|im_end|>" not in text:  # which the project breaks with a character of its own
                assert scored[place].ids == ids[0].tolist()
                assert found[place] == pytest.approx(by_hand, abs=1e-5)
            place += 1
    assert place == len(found) == 7
    assert len({round(value) for value in found.values()}) > 3


def test_all_choices_of_one_token_share_the_probability(tiny_models, tokenizer):
    """The letters' likelihoods are single probabilities: each is below 1, and so is their sum."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_models(), dtype=torch.float32).eval()
    tokenizer = speaking(tokenizer)
    scored = encode_choices(choices_of(QUIZ[1])[0], tokenizer, "letter")
    assert [len(one.ids) - one.first for one in scored] == [1, 1, 1]
    assert tokenizer.decode(scored[0].ids[: scored[0].first]).count("C. the fox") == 1
    assert sum(math.exp(value) for _, value in log_likelihoods(model, scored, 2, 0)) < 1


def test_each_choice_gets_its_own_likelihood_back(tiny_models, tokenizer):
    """The longest are computed first, which is another order than the rows'."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_models(), dtype=torch.float32).eval()
    eval_model = EvalModel("model", None, None, speaking(tokenizer), model.config)
    task, rows = (
        MultipleChoice("text"),
        choices_of(*({**row, "choices": ["3", "Paris is.", "好"], "answer": 0} for row in QUIZ)),
    )
    encoded = {number: task.encode(eval_model, row) for number, row in zip((4, 7, 9), rows, strict=True)}
    found = dict(task.answer(model, eval_model, encoded, batch_size=2))
    assert set(found) == {4, 7, 9}
    for number, scored in encoded.items():
        alone = [dict(log_likelihoods(model, [one], 1, 0))[0] for one in scored]
        assert found[number] == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("name", template_dict)
def test_in_each_format_a_choice_is_all_that_follows_the_prompt(name):
    import tiny

    tokenizer = speaking(tiny.tokenizer_for(template_dict[name], tiny.byte_level_tokenizer), name)
    row = choices_of({"question": "好 or Paris?", "choices": ["Paris", "好", "a</s>b", "<|im_end|>"], "answer": 0})[0]
    prompt = tokenizer.apply_chat_template(row.messages, tokenize=False, add_generation_prompt=True)
    for one, text in zip(encode_choices(row, tokenizer), row.texts, strict=True):
        assert tokenizer.decode(one.ids[: one.first]) == prompt
        assert tokenizer.decode(one.ids[one.first :]).lstrip(" ") == text
        assert not set(one.ids[one.first :]) & set(tokenizer.all_special_ids)


def test_a_thought_that_the_format_sets_before_each_answer_is_not_counted(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think></think>\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    one = encode_choices(choices_of(QUIZ[0])[0], tokenizer)[0]
    assert tokenizer.decode(one.ids[one.first :]) == "Paris."
    assert tokenizer.decode(one.ids).endswith("<think></think>\nParis.")


@pytest.mark.parametrize(("answer", "place"), [(0, 0), (1, 1), ("B", 1), ("b", 1), ("no", 1), ("1", 1), (" yes ", 0)])
def test_the_forms_of_an_answer(answer, place):
    row = {"question": "Well?", "choices": ["yes", "no"], "answer": answer}
    assert choices_of(row)[0].answer == place
    row["choices"] = json.dumps(row["choices"])  # a cell of a CSV file
    assert choices_of(row)[0].answer == place


def test_choices_with_names_of_their_own():
    row = choices_of({"question": "Well?", "choices": {"1": "yes", "2": "no", "3": None}, "answer": 2})[0]
    assert (row.letters, row.texts, row.answer) == (["1", "2"], ["yes", "no"], 1)


@pytest.mark.parametrize(("change", "told"), [
    ({"answer": 2}, "an index from 0 to 1"), ({"answer": "C"}, "one of A, B"), ({"answer": True}, "true or false"),
    ({"answer": -1}, "-1"), ({"answer": None}, "no field 'answer'"), ({"choices": ["yes"]}, "at least two"),
    ({"choices": ["yes", " yes"]}, "'yes' twice"), ({"choices": ["yes", ""]}, "empty text as choice B"),
    ({"choices": ["yes", 3]}, "a number in 'B'"), ({"choices": "yes or no"}, "a text in 'choices'"),
    ({"choices": []}, "empty list"), ({"question": ""}, "empty question"), ({"question": 5}, "a number"),
    ({"choices": ["B", "A"], "answer": "A"}, "the letter of A and the text of B"),
    ({"choices": ["1", "2"], "answer": "1"}, "the text of A and the index from 0 of B"),
])  # fmt: skip
def test_a_row_that_is_no_question_says_why(change, told):
    with pytest.raises(BadRow) as error:
        choices_of({"question": "Well?", "choices": ["yes", "no"], "answer": 0} | change)
    assert told in str(error.value)


def test_the_share_of_right_answers_and_its_error():
    figure = share_right("accuracy", "accuracy", [True, True, True, False])
    assert figure.value == 75
    # the standard deviation of 1, 1, 1, 0 is 0.5, over the root of 4
    assert figure.error == pytest.approx(25)
    assert share_right("accuracy", "accuracy", [True]).error is None


# ------------------------------------------------------------------------------ the command


@pytest.mark.parametrize("said", ["", "Hello! 好。"], ids=["empty", "some"])
@pytest.mark.parametrize("rows", [
    [{"instruction": "Hi", "output": "Hello!"}], [{"instruction": "再见", "output": "好。"}],
    [{"instruction": "Hi", "output": "Hello!"}, {"instruction": "再见", "output": "好。"}],
    [{"instruction": "Hi", "output": "?!"}, {"instruction": "Hi", "output": "x"}],
], ids=["one English row", "one Chinese row", "mixed", "signs"])  # fmt: skip
def test_the_files_are_written_whatever_the_rows_are_like(rows, said, tiny_models, tmp_path, capsys, monkeypatch):
    """Each score of sacrebleu is as if it were the first one that the process computes."""
    for cached in (metrics._bleu, metrics._chrf, metrics._rouge):
        cached.cache_clear()
    monkeypatch.setattr(
        "utils.evaluate.evaluate.answer_with", lambda task, one, encoded, args: dict.fromkeys(encoded, said)
    )
    lines, summary, out, _ = run(tmp_path, capsys, tiny_models(), rows, "--template_name", "qwen")
    assert len(lines) == summary["rows"] == len(rows)
    figures = summary["figures"][next(iter(summary["figures"]))]
    assert {name for name in figures if "bleu" in name} | {"chrf"} == set(summary["sacrebleu"])
    assert "ROUGE-L" in out


def test_answers_of_a_run_and_its_base_side_by_side(run_folder, tmp_path, capsys):
    from sacrebleu import corpus_chrf

    rows = [
        {"instruction": "Hi", "output": "Hello!"},
        {"instruction": "Who?"},
        {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "The fox."}]},
        {"instruction": "Who? " * 600, "output": "x"},
        {"instruction": "再见", "output": "好！"},
        {"question": "?"},
        {"instruction": "Who? " * 9, "output": "The fox, the fox."},  # the longest prompt is answered first
    ]
    lines, summary, out, err = run(tmp_path, capsys, run_folder, rows, "--max_new_tokens", "8")
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
    lines, summary, out, err = run(tmp_path, capsys, run_folder, [*rows, {"question": "Who?", "choices": ["x"]}])
    assert [line["scores"]["trained"]["chosen"] for line in lines] == ["A", "B", "C"]
    assert all(line["scores"]["trained"]["right"] for line in lines)
    assert lines[0]["answer"] == "A" and lines[0]["choices"]["B"] == "The fox."
    scores = lines[1]["scores"]["trained"]
    assert scores["log_likelihood_per_byte"][2] == pytest.approx(scores["log_likelihood"][2] / 6, abs=1e-5)
    assert math.exp(scores["log_likelihood"][1]) > 1 / 3  # the answer that it gives
    assert summary["figures"]["trained"]["accuracy"]["value"] == 100
    assert summary["figures"]["base"]["accuracy"]["value"] < 100
    assert "(guessing)" in out and "33.33" in out and "asked.jsonl:4 has no field 'answer'" in err
    letters = run(
        tmp_path, capsys, run_folder, rows, "--choice_form", "letter", "--overwrite", "true", "--compare_base", "false"
    )
    assert list(letters[1]["figures"]) == ["model"] and "accuracy_per_byte" not in letters[1]["figures"]["model"]


def test_the_base_of_an_adapter_answers_as_alone(train, tiny_models, tmp_path, capsys):
    from utils.script import infer

    folder = train("--learning_rate", "1e-2", "--num_train_epochs", "8")
    rows = [{"instruction": "The dog?", "output": "The lazy dog."}, {"instruction": "Count.", "output": "1 2 3"}]
    lines, summary, _, err = run(tmp_path, capsys, folder, rows, "--max_new_tokens", "6", "--dtype", "float32")
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


def test_a_base_without_a_format_stops_where_the_trained_model_does(train, tiny_models):
    args = evaluate.EvaluateArgs(model_path=str(train()))
    models, problems = check_eval_models(args, compare_base=True, insist=True)
    assert not problems
    for eval_model in load_eval_models(args, models):
        stop = eval_model.tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert eval_model.tokenizer.eos_token_id == stop
        assert stop in eval_model.load().generation_config.eos_token_id


def test_a_model_alone_without_a_format_is_asked_in_plain_text(tiny_models, tmp_path, capsys):
    lines, summary, out, err = run(tmp_path, capsys, tiny_models(), QUIZ, "--max_rows", "2")
    assert len(lines) == 2 and list(summary["figures"]) == ["model"] and "difference" not in out
    assert "template 'default'" in err and "does not say what it was trained on" in err


def test_a_file_that_exists_is_kept_and_replaced_only_by_name(tiny_models, refused, tmp_path):
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
def test_what_is_refused(tiny_models, refused, tmp_path, rows, flags, told):
    data = write_rows(tmp_path / "asked.jsonl", rows)
    output = str(tmp_path / ("eval.json" if told == "4 errors" else "eval.jsonl"))
    said = refused(evaluate.main, "--model_path", tiny_models(), "--eval_data_path", data, "--output", output, *flags)
    assert told in said


def test_flags_that_are_missing(refused):
    said = refused(evaluate.main)
    assert all(f"--{name} is missing" in said for name in ("model_path", "eval_data_path", "output"))


def test_a_base_that_is_gone_or_has_other_weights(run_folder, refused, tmp_path, tiny_models):
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


def test_the_sample_has_facts_that_tuning_never_told():
    from data.build.choice_rows import build_choices

    def rows_of(name):
        return [json.loads(line) for line in (ROOT / "data" / name).read_text(encoding="utf-8").splitlines()]

    rows = rows_of("choices_data.jsonl")
    assert rows == build_choices() and 20 <= len(rows) <= 40
    held_back = {row["instruction"]: row["output"] for row in rows_of("sft_eval_data.jsonl")}
    trained = {row["instruction"] for row in rows_of("sft_data.jsonl")}
    for row in choices_of(*rows):
        question = row.messages[-1]["content"]
        assert question not in trained and held_back[question] == row.texts[row.answer] and len(row.texts) == 4
