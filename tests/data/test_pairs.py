"""Preference pairs: the formats, what is wrong with a row, the ids, the lengths."""

import dataclasses
import json

import pytest
import tiny
from conftest import write_rows

from utils.data.bad_rows import BadRow, EmptyRow, EqualPair
from utils.data.pairs import to_pair
from utils.data.truncate import encode_pairs_within
from utils.template import get_template, template_dict

DPO = ["--train_args_path", "train_args/dpo/base.py"]
SYSTEM, USER = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}
GOOD, BAD = {"role": "assistant", "content": "Hello"}, {"role": "assistant", "content": "What?"}
PAIR = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Hi", "chosen": "Hello", "rejected": "What?"}, [USER]),
        ({"prompt": "Hi", "chosen": "Hello", "reject": "What?"}, [USER]),
        ({"prompt": "Hi", "system": "Be kind.", "chosen": "Hello", "rejected": "What?"}, [SYSTEM, USER]),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, [USER]),
        ({"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]}, [SYSTEM, USER]),
        ({"prompt": [USER], "system": "Be kind.", "chosen": [GOOD], "rejected": [BAD]}, [SYSTEM, USER]),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER]),
        ({"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD, USER, BAD]}, [USER, GOOD, USER]),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD], "system": "Be kind."}, [SYSTEM, USER]),
        # the answers repeat the prompt: it stands once
        ({"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER]),
        ({"prompt": [SYSTEM, USER], "chosen": [USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, [SYSTEM, USER]),
        ({"prompt": "Hi", "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, [SYSTEM, USER]),
        # other programs' forms; UltraFeedback's has the chosen conversation a second time
        ({"prompt": "Hi", "prompt_id": "f0", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD],
          "score_chosen": 8.0, "score_rejected": 5.5}, [USER]),
        ({"instruction": "Hi", "input": "", "chosen": "Hello", "rejected": "What?"}, [USER]),
        ({"prompt": "Hi", "history": [["Hi", "Hello"]], "chosen": "Hello", "rejected": "What?"}, [USER, GOOD, USER]),
        ({"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Hello"},
          "rejected": {"from": "gpt", "value": "What?"}}, [USER]),
    ],
)  # fmt: skip
def test_formats(row, prompt):
    assert to_pair(row) == {"prompt": prompt, "chosen": [GOOD], "rejected": [BAD]}


def test_answers_of_several_turns_part_where_they_first_differ():
    pair = to_pair({"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, BAD, USER, BAD]})
    assert pair == {"prompt": [USER], "chosen": [GOOD, USER, GOOD], "rejected": [BAD, USER, BAD]}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "Hi", "chosen": "Hello"}, "no field 'rejected'"),
        (
            {"prompt": "Hi", "chosen": "Hello", "rejected": "What?", "score_chosen": 3, "score_rejected": 8.5},
            "has a 'score_chosen' 3 below its 'score_rejected' 8.5",
        ),
        ({"prompt": "Hi", "rejected": "Hello"}, "no field 'chosen'"),
        ({"chosen": "Hello", "rejected": "What?"}, "no 'prompt'"),
        ({"prompt": "Hi", "chosen": 3, "rejected": "b"}, "a number in 'chosen'"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "null in 'prompt'"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "empty prompt"),
        ({"prompt": [GOOD], "chosen": [GOOD], "rejected": [BAD]}, "ends with assistant"),
        ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "Ho"}, BAD]}, "prompts that differ"),
        ({"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD, SYSTEM, BAD]}, "prompts that differ: at turn 3"),
        ({"prompt": "Hi", "chosen": [{**USER, "content": "Ho"}, GOOD], "rejected": [USER, BAD]}, "another prompt"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD, USER, BAD]}, "only the beginning"),
        ({"chosen": [USER, GOOD, USER], "rejected": [USER, BAD]}, "does not end with the assistant"),
        ({"prompt": [USER], "chosen": [USER], "rejected": [BAD]}, "the prompt and no answer"),
        ({"prompt": [USER], "chosen": [USER, USER, GOOD], "rejected": [BAD]}, "after the prompt a turn of the user"),
        ({"instruction": "Hi", "output": "Hello"}, "looks like a row for sft"),
        ({"messages": [USER, GOOD]}, "train_args/sft/base.py"),
        ({"text": "Hi"}, "looks like a row for pretrain"),
        ({"question": "Hi"}, "['question']"),
        ({"prompt": [SYSTEM, USER], "system": "x", "chosen": "a", "rejected": "b"}, "keep one of them"),
        (
            {"prompt": "Hi", "chosen": "a", "rejected": "b", "reject": "c"},
            "'reject' beside 'rejected', and they differ",
        ),
        ({"prompt": "Hi", "instruction": "Ho", "chosen": "a", "rejected": "b"}, "'instruction' beside 'prompt'"),
        ({"prompt": [USER], "history": [["a", "b"]], "chosen": "a", "rejected": "b"}, "'history' beside 'prompt'"),
        ("Hi", "is a text"),
    ],
)
def test_what_is_wrong_is_said(row, said):
    with pytest.raises(BadRow) as error:
        to_pair(row)
    assert said in str(error.value) and not isinstance(error.value, EmptyRow)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_empty_answers_and_equal_ones_have_nothing_to_train(side):
    with pytest.raises(EmptyRow, match=f"empty answer in '{side}'"):
        to_pair({"prompt": "Hi", "chosen": "a", "rejected": "b", side: " "})
    for row in ({"prompt": "Hi", "chosen": "a", "rejected": "a"}, {"chosen": [USER, GOOD], "rejected": [USER, GOOD]}):
        with pytest.raises(EqualPair):
            to_pair(row)


def tokenizer_of(name):
    make = tiny.sentencepiece_tokenizer if name in ("llama2", "mistral", "minicpm") else tiny.byte_level_tokenizer
    tokenizer = tiny.tokenizer_for(template_dict[name], make)
    tokenizer.eos_token = tokenizer.eos_token or "</s>"
    return tokenizer


@pytest.mark.parametrize("name", sorted(template_dict))
def test_ids_are_those_of_sft_up_to_the_stop_token(name):
    """The prompt stands once, the answers end with their stop token, and nothing else is trained."""
    tokenizer = tokenizer_of(name)
    template = get_template(name, tokenizer)
    rows = [[USER, GOOD, USER], [USER]]
    pairs = [{"prompt": prompt, "chosen": [GOOD], "rejected": [BAD]} for prompt in rows]
    for pair, row in zip(pairs, encode_pairs_within(pairs, template, tokenizer, 8192, 4096), strict=True):
        for side in ("chosen", "rejected"):
            sft = template.encode(pair["prompt"] + pair[side], tokenizer, train_on="last_turn")
            ids = row["prompt_ids"] + row[f"{side}_ids"]
            labels = [-100] * len(row["prompt_ids"]) + row[f"{side}_labels"]
            assert ids == sft["input_ids"][: len(ids)] and labels == sft["labels"][: len(ids)]
            assert all(label == -100 for label in sft["labels"][len(ids) :])
            assert ids[-1] == labels[-1] == tokenizer.convert_tokens_to_ids(template.stop_token())
        bos = tokenizer.bos_token_id
        if bos is not None and template.bos:
            assert row["prompt_ids"].count(bos) == (2 if name == "llama2" and len(pair["prompt"]) > 1 else 1)
        assert row["prompt_ids"][0] != tokenizer.eos_token_id  # no eos put in for a missing BOS


def test_of_an_answer_of_several_turns_only_the_assistants_are_trained(tokenizer):
    pair = {"prompt": [USER, GOOD, USER], "chosen": [GOOD, USER, GOOD], "rejected": [BAD]}
    row = encode_pairs_within([pair, PAIR], get_template("qwen"), tokenizer, 1024, 512)[0]
    trained = [label for label in row["chosen_labels"] if label != -100]
    assert tokenizer.decode(trained) == "Hello<|im_end|>Hello<|im_end|>"
    assert tokenizer.decode(row["chosen_ids"]).endswith("user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>")


def test_answers_that_a_format_makes_equal_are_dropped(tokenizer):
    template = get_template("gemma")
    pair = {**PAIR, "chosen": [GOOD], "rejected": [{**GOOD, "content": "Hello "}]}
    dropped = encode_pairs_within([pair], template, tokenizer_of("gemma"), 1024, 512)[0]
    assert dropped.kind == EqualPair.kind


LONG = [
    SYSTEM,
    {"role": "user", "content": "The quick brown fox. " * 9},
    GOOD,
    {"role": "user", "content": "The lazy dog. " * 9},
]


def lengths(row):
    return len(row["prompt_ids"]), len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


@pytest.mark.parametrize("limits", [(1024, 60), (70, 60), (70, 69), (60, 512), (35, 512), (1024, 35)])
def test_a_long_prompt_loses_its_oldest_turns_never_system_nor_answer(tokenizer, limits):
    pair = {"prompt": LONG, "chosen": [GOOD], "rejected": [BAD]}
    row = encode_pairs_within([pair], get_template("qwen"), tokenizer, *limits)[0]
    prompt, whole = lengths(row)
    assert whole <= limits[0] and prompt <= limits[1] and row["shortened"]
    text = tokenizer.decode(row["prompt_ids"])
    assert text.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n")
    assert "fox" not in text and text.endswith("lazy dog. <|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(row["chosen_ids"]) == "Hello<|im_end|>"
    assert tokenizer.decode(row["rejected_ids"]) == "What?<|im_end|>"


def test_no_answer_of_the_pair_is_ever_taken_for_a_turn_to_drop(tokenizer):
    pair = {"prompt": LONG[1:2], "chosen": [GOOD, USER, GOOD], "rejected": [BAD, USER, BAD]}
    row = encode_pairs_within([pair], get_template("qwen"), tokenizer, 70, 40)[0]
    assert tokenizer.decode(row["chosen_ids"]).count("Hello<|im_end|>") == 2
    assert "fox" in tokenizer.decode(row["prompt_ids"])


def test_a_pair_whose_answer_does_not_fit_is_dropped(tokenizer):
    pair = {**PAIR, "rejected": [{**BAD, "content": "Count " * 60}]}
    dropped, kept = encode_pairs_within([pair, PAIR], get_template("qwen"), tokenizer, 60, 40)
    assert dropped.kind == "too long" and "never cut" in dropped.reason
    assert not kept["shortened"]
    assert encode_pairs_within([pair], get_template("qwen"), tokenizer, 60, 40, truncate=False)[0].kind == "too long"


def test_both_modes_see_the_same_rows(tiny_models, tmp_path):
    from utils.args import parse_args
    from utils.model.tokenizer import load_tokenizer
    from utils.tasks import get_task

    data = write_rows(tmp_path / "pairs.jsonl", [*tiny.PAIRS, {"prompt": LONG, "chosen": "Yes.", "rejected": "No."}])
    found = []
    for mode in ("dpo_multi", "dpo_single"):
        argv = [*DPO, "--task_type", mode, "--train_data_path", data, "--model_name_or_path", tiny_models()]
        args, train_args = parse_args([*argv, "--max_len", "80", "--max_prompt_length", "50"])
        tokenizer = load_tokenizer(tiny_models())
        found.append(get_task(mode).load_datasets(args, train_args, get_template("qwen"), tokenizer))
    assert found[0].train.to_list() == found[1].train.to_list()
    assert found[0].report.shortened == found[1].report.shortened >= 1


def test_dropped_pairs_are_counted_and_named(train, tmp_path):
    rows = [
        *tiny.PAIRS,
        {"prompt": "Hi", "chosen": "a", "rejected": "a"},
        {"prompt": "Hi", "chosen": "", "rejected": "b"},
    ]
    folder = train(*DPO, data=write_rows(tmp_path / "pairs.jsonl", rows))
    log = (folder / "train.log").read_text(encoding="utf-8")
    assert "1 with chosen equal to rejected, 1 with nothing to train" in log
    assert "has chosen equal to rejected: line 9" in log and "has an empty answer in 'chosen': line 10" in log
    summary = json.loads((folder / "train_args.json").read_text(encoding="utf-8"))["summary"]
    assert (summary["rows_trained"], summary["rows_dropped"]) == (8, 2)


@pytest.mark.parametrize(
    ("flags", "rows", "said"),
    [
        (DPO, tiny.ROWS, "looks like a row for sft, not for this task; use --train_args_path train_args/sft/base.py"),
        ([], tiny.PAIRS, "looks like a row for dpo, not for this task; use --train_args_path train_args/dpo/base.py"),
        (["--train_args_path", "train_args/pretrain/base.py"], tiny.PAIRS, "looks like a row for dpo"),
        (DPO, [{"text": "Hello"}], "train_args/pretrain/base.py"),
    ],
)
def test_a_file_of_another_task_is_told_as_such(refused, tiny_models, tmp_path, flags, rows, said):
    import main_train

    data = write_rows(tmp_path / "rows.jsonl", rows)
    run = ["--model_name_or_path", tiny_models(), "--train_data_path", data, "--output_dir", str(tmp_path / "run")]
    assert said in refused(main_train.main, *flags, *run)
    assert not (tmp_path / "run").exists()


def test_lists_of_turns_stand_in_csv_as_json(tmp_path):
    import csv

    from utils.data.files import read_rows

    with open(tmp_path / "pairs.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "chosen", "rejected"])
        writer.writerow([json.dumps([USER]), json.dumps([GOOD]), json.dumps([BAD])])
        writer.writerow(["1 + 2", "3", "[4]"])
    rows = [row.value for row in read_rows(str(tmp_path / "pairs.csv"))]
    assert to_pair(rows[0]) == PAIR
    assert rows[1] == {"prompt": "1 + 2", "chosen": "3", "rejected": "[4]"}


def test_a_pair_the_format_has_no_form_for_is_named_by_line(tiny_models, tmp_path):
    from utils.args import parse_args
    from utils.model.tokenizer import load_tokenizer
    from utils.runtime.errors import UserError
    from utils.tasks import get_task

    rows = [*tiny.PAIRS, {"prompt": [USER, USER], "chosen": "a", "rejected": "b"}]
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    args, train_args = parse_args([*DPO, "--train_data_path", data, "--model_name_or_path", tiny_models()])
    template = dataclasses.replace(get_template("qwen"), alternate=True)
    with pytest.raises(UserError, match="pairs.jsonl:9 turn 2 is user where template 'qwen' needs assistant"):
        get_task("dpo_multi").load_datasets(args, train_args, template, load_tokenizer(tiny_models()))
