"""From files to ids and labels: what is kept, what is dropped and named, and what is cached."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from conftest import write_rows

from utils.args import parse_args
from utils.data.report import BROKEN_UNICODE, SHORTENED
from utils.data.truncate import CUT_OFF, MARKED
from utils.runtime.errors import UserError
from utils.tasks import get_task
from utils.template import get_template, template_dict
from utils.template.messages import UNTRAINED_ANSWER

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris is."},
    {"role": "user", "content": "The quick brown fox"},
    {"role": "assistant", "content": "jumps over"},
]


@pytest.fixture
def load(tiny_models, tmp_path, tokenizer):
    """Prepares rows as main_train.py does; returns the task's Data."""

    def run(rows, *flags, task="sft"):
        path = rows if isinstance(rows, str) else write_rows(tmp_path / "rows.jsonl", rows)
        args, train_args = parse_args(
            [
                "--train_args_path",
                f"train_args/{task}/base.py",
                "--model_name_or_path",
                tiny_models(),
                "--train_data_path",
                path,
                "--output_dir",
                str(tmp_path / "run"),
                "--cache_dir",
                str(tmp_path / "cache"),
                *flags,
            ]
        )
        template = get_template(args.template_name, tokenizer)
        return get_task(task).load_datasets(args, train_args, template, tokenizer)

    return run


def test_rows_are_the_templates_encoding(load, tokenizer):
    data = load([{"instruction": "Hi", "output": "Hello"}, {"instruction": "你好", "output": "再见"}])
    expected = get_template("qwen", tokenizer).encode(
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], tokenizer
    )
    assert data.train[0] == {**expected, "source": [1]}
    assert (data.report.rows, data.report.kept, data.report.dropped) == (2, 2, {})
    assert data.report.trained_tokens == sum(label != -100 for row in data.train for label in row["labels"])


def test_rows_with_an_empty_answer_are_dropped_and_named(load):
    rows = [*tiny.ROWS, {"instruction": "Hi", "output": ""}]
    report = load(rows).report
    assert report.dropped == {"with nothing to train": 1}
    (record,) = report.records
    assert (Path(record.file).name, *record[1:]) == (
        "rows.jsonl", len(rows), "with nothing to train", "has an empty output",
    )  # fmt: skip
    assert report.named_places().endswith(f"rows.jsonl has an empty output: line {len(rows)}")


BAD = [{"instruction": "a", "output": 3}, {"instruction": "b"}, {"instruction": "c", "output": "d"}]


def test_malformed_rows_stop_the_run_all_in_one_message(load, tmp_path):
    with pytest.raises(UserError) as error:
        load(BAD)
    text = str(error.value)
    assert "rows.jsonl:1 has a number in 'output'" in text and "rows.jsonl:2 has no field 'output'" in text
    assert "2 of 3 rows" in text and "--on_bad_row drop" in text
    assert list((tmp_path / "cache").glob("*")) == []


def test_rows_with_the_same_reason_are_listed_together(load):
    with pytest.raises(UserError) as error:
        load([{"instruction": "a"}] * 50)
    assert str(error.value).count("no field 'output'") == 1 and "the same: line 2, 3, " in str(error.value)


def test_on_bad_row(load):
    report = load(BAD, "--on_bad_row", "drop").report
    assert report.dropped == {"malformed": 2} and report.kept == 1
    with pytest.raises(UserError, match="empty output"):
        load([*tiny.ROWS, {"instruction": "a", "output": ""}], "--on_bad_row", "error")


def test_a_max_len_that_leaves_nothing_is_refused(load):
    with pytest.raises(UserError) as error:
        load(tiny.ROWS, "--max_len", "4")
    assert "none of the 8 rows keeps a trained token" in str(error.value) and "--max_len" in str(error.value)


@pytest.mark.parametrize("rows", [[{"instruction": "a", "output": ""}], [BAD[0]]])
def test_no_row_left(load, rows):
    with pytest.raises(UserError, match="none of the 1 rows"):
        load(rows, "--on_bad_row", "drop")


def test_a_second_start_reads_the_cache(load, tmp_path, monkeypatch):
    first = load(tiny.ROWS)
    import utils.data.prepare

    monkeypatch.setattr(utils.data.prepare, "_prepare", lambda *_: pytest.fail("tokenised again"))
    second = load(tiny.ROWS)
    assert second.train[:] == first.train[:] and second.report == first.report


@pytest.mark.parametrize(
    "change",
    [
        ["--max_len", "200"],
        ["--template_name", "default"],
        ["--packing", "true"],
        ["--on_bad_row", "drop"],
        ["--overlong", "drop"],
        ["--train_on", "last_turn"],
        ["--allow_special_tokens_in_content", "true"],
        "content",
    ],
)
def test_what_changes_rows_makes_them_anew(load, tmp_path, change):
    load(tiny.ROWS)
    if change == "content":
        load(tiny.ROWS[:-1])
    else:
        load(tiny.ROWS, *change)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_several_processes_give_the_same_rows(load, tokenizer):
    one = load(tiny.ROWS * 5, "--dataset_num_proc", "1").train[:]
    two = load(tiny.ROWS * 5, "--dataset_num_proc", "2", "--max_len", "1023").train[:]
    assert one == two


def test_validation_rows_are_held_back(load):
    data = load(tiny.ROWS, "--val_size", "2")
    assert (len(data.train), len(data.eval)) == (6, 2)
    again = load(tiny.ROWS, "--val_size", "2")
    assert data.eval[:] == again.eval[:]
    by_seed = [load(tiny.ROWS, "--val_size", "2", "--seed", str(seed)).eval["source"] for seed in range(4)]
    assert len({str(rows) for rows in by_seed}) > 1
    assert len(load(tiny.ROWS, "--val_size", "0.5").eval) == 4
    with pytest.raises(UserError, match="leaves no row"):
        load(tiny.ROWS, "--val_size", "8")


def test_packed_rows_hold_whole_conversations(load):
    plain = load(tiny.ROWS).train
    packed = load(tiny.ROWS, "--packing", "true", "--max_len", "150").train
    assert len(packed) < len(plain)
    pieces = []
    for row in packed:
        assert sum(row["seq_lengths"]) == len(row["input_ids"]) <= 150
        start = 0
        for length in row["seq_lengths"]:
            pieces.append((row["input_ids"][start : start + length], row["labels"][start : start + length]))
            start += length
    assert sorted(pieces) == sorted((row["input_ids"], row["labels"]) for row in plain)


def test_pretraining_trains_every_token_and_loses_none(load, tokenizer):
    texts = ["The quick brown fox jumps over the lazy dog. " * 20, "Be brief.", "你好，再见"]
    data = load([{"text": text} for text in texts], "--max_len", "64", task="pretrain")
    ids = [token for row in data.train for token in row["input_ids"]]
    expected = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    assert sorted(ids) == sorted(token for row in expected for token in row)
    assert all(row["labels"] == row["input_ids"] and len(row["input_ids"]) <= 64 for row in data.train)


def test_pretraining_reads_text_files(load, tmp_path):
    (tmp_path / "a.txt").write_text("The fox.\n\nThe dog.\n")
    assert load(str(tmp_path / "a.txt"), task="pretrain").report.rows == 2


# ---------------------------------------------------------------------------- rows that are too long


def test_overlong(load):
    """The longest of the rows is shortened, left out, or stops the run, and is named each time."""
    longest = {"instruction": "The quick brown fox " * 20, "output": "jumps"}
    rows = [*tiny.ROWS, longest]
    shortened = load(rows, "--max_len", "100").report
    assert (shortened.kept, shortened.shortened) == (9, 1)
    assert [group.lines for group in shortened.groups(SHORTENED)] == [[9]]
    dropped = load(rows, "--max_len", "100", "--overlong", "drop").report
    assert dropped.kept == 8
    assert dropped.named_places().endswith("is too long for --max_len 100: line 9")
    with pytest.raises(UserError, match="1 of 9 rows are too long.*\n.*line 9"):
        load(rows, "--max_len", "100", "--overlong", "error")


def test_train_on_the_last_turn(load, tokenizer):
    def said(*flags):
        labels = load([{"messages": TURNS}], *flags).train[0]["labels"]
        return tokenizer.decode([label for label in labels if label != -100])

    assert said() == "Paris is.<|im_end|>jumps over<|im_end|>"
    assert said("--train_on", "last_turn") == "jumps over<|im_end|>"
    assert said("--train_on", "last_n:1") == "jumps over<|im_end|>" and said("--train_on", "last_n:2") == said()


@pytest.mark.parametrize("template", ["qwen", "auto"])
def test_train_on_the_whole_conversation_but_answers_that_are_marked(load, tokenizer, template, tmp_path):
    """Also the system message, the questions and what the format writes; a marked answer and its stop token not."""
    tokenizer.chat_template = get_template("qwen").to_jinja()
    template = get_template(template, tokenizer)
    turns = TURNS
    encoded = template.encode(turns, tokenizer, train_on="prompt")
    assert encoded["labels"] == encoded["input_ids"] == template.encode(turns, tokenizer)["input_ids"]
    marked = [{**turn, "train": False} if turn["content"] == "Paris is." else turn for turn in turns]
    encoded = template.encode(marked, tokenizer, train_on="prompt")
    left_out = [token for token, label in zip(*encoded.values(), strict=True) if label == -100]
    assert tokenizer.decode(left_out) == "Paris is.<|im_end|>"
    weighted = [{**turn, "train": 2.0} if turn["content"] == "Paris is." else turn for turn in turns]
    encoded = template.encode(weighted, tokenizer, train_on="prompt")
    heavy = [token for token, weight in zip(encoded["labels"], encoded["loss_weights"], strict=True) if weight == 2]
    assert tokenizer.decode(heavy) == "Paris is.<|im_end|>" and -100 not in encoded["labels"]


def test_an_answer_that_would_be_trained_with_the_prompt_is_refused(load):
    rows = [{"messages": TURNS}, {"messages": [*TURNS[:2], {"role": "assistant", "content": " "}, *TURNS[1:]]}]
    assert load(rows).report.untrained == 1
    with pytest.raises(UserError, match="rows.jsonl:2 has an empty answer, and --train_on prompt cannot leave it out"):
        load(rows, "--train_on", "prompt")


def test_answers_are_counted_and_those_not_trained_have_a_reason_and_a_line(load):
    answer = {"role": "assistant", "content": "Yes."}
    rows = [
        {"messages": TURNS},
        {"messages": [*TURNS[:2], {**answer, "weight": 0}, *TURNS[1:]]},
        {"messages": [*TURNS[:2], {"role": "assistant", "content": ""}, *TURNS[1:]]},
        {"messages": [turn for _ in range(60) for turn in ({"role": "user", "content": "Yes?"}, answer)]},
    ]
    report = load(rows, "--max_len", "100").report
    reasons = {group.reason: (group.lines[0], group.count) for group in report.groups(UNTRAINED_ANSWER)}
    assert report.answers == 2 + 3 + 3 + 60 and report.not_chosen == 0
    assert reasons == {MARKED: (2, 1), "has an empty answer": (3, 1), CUT_OFF: (4, reasons[CUT_OFF][1])}
    assert report.untrained == 2 + reasons[CUT_OFF][1] and 0 < reasons[CUT_OFF][1] < 60
    assert report.untrained_answers() == f"{report.untrained} of 68 answers are not trained"
    assert load(rows, "--train_on", "last_n:50", "--max_len", "100").report.untrained > 30  # selected, and cut off
    report = load(rows, "--train_on", "last_turn").report
    assert (report.untrained, report.not_chosen) == (1, 68 - 1 - 4)  # the marked one; none is counted twice


@pytest.mark.parametrize("template", ["qwen", "auto"])
def test_equal_rows_are_counted_each_for_itself(load, tokenizer, template):
    tokenizer.chat_template = get_template("qwen").to_jinja()
    row = {"messages": [*TURNS[:3], TURNS[1], {**TURNS[4], "weight": 0}]}
    report = load([row] * 5, "--template_name", template).report
    assert (report.answers, report.untrained) == (10, 5)


def test_a_row_the_template_cannot_hold_is_named_with_its_turn(load):
    rows = [*tiny.ROWS, {"messages": [*TURNS, TURNS[2]]}]
    assert load(rows).report.kept == 9
    with pytest.raises(UserError, match="rows.jsonl:9 turn 6 is assistant where template 'default' needs user"):
        load(rows, "--template_name", "alternating")


@pytest.fixture(autouse=True)
def alternating_template(monkeypatch):
    """A format like Mistral's in what it refuses, for the tests' own tokenizer."""
    template = replace(template_dict["default"], alternate=True)
    monkeypatch.setitem(template_dict, "alternating", template)


def test_special_tokens_in_content_are_plain_text_unless_allowed(load, tokenizer):
    rows = [{"instruction": "a<|im_end|>b", "output": "c"}]
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert load(rows).train[0]["input_ids"].count(stop) == 3
    assert load(rows, "--allow_special_tokens_in_content", "true").train[0]["input_ids"].count(stop) == 4
    # nothing is left of what kept the text from becoming the token
    assert "<|im_start|>user\na<|im_end|>b<|im_end|>\n" in tokenizer.decode(load(rows).train[0]["input_ids"])


def test_a_bad_line_costs_no_other(load, tmp_path):
    good = b'{"instruction": "a", "output": "b"}\n'
    (tmp_path / "mixed.jsonl").write_bytes(good * 3 + b'{"instruction": "\xe9", "output": "b"}\n' + good * 3)
    report = load(str(tmp_path / "mixed.jsonl"), "--on_bad_row", "drop").report
    assert (report.rows, report.kept, report.dropped) == (7, 6, {"malformed": 1})
    assert [(group.lines, group.kind) for group in report.groups()] == [([4], BROKEN_UNICODE)]
    (tmp_path / "broken.csv").write_text('instruction,output\na,b\n"a"x,b\na,b\n')
    with pytest.raises(UserError, match="broken.csv:3 is not CSV"):
        load(str(tmp_path / "broken.csv"), "--on_bad_row", "drop")


@pytest.mark.parametrize("row", [
    '{"instruction": "a", "history": [["\\ud800", "b"]], "output": "c"}',
    '{"messages": [{"role": "user", "content": "a", "name": "\\ud800"}, {"role": "assistant", "content": "b"}]}',
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": 5, "tool_calls": [{}]}]}',
    '{"instruction": "a", "output": ' + "9" * 6000 + "}",
])  # fmt: skip
def test_odd_rows_are_named_with_all_others(load, tmp_path, row):
    (tmp_path / "odd.jsonl").write_text('{"instruction": "a"}\n' + row + "\n5\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        load(str(tmp_path / "odd.jsonl"))
    assert "3 of 3 rows" in str(error.value)


@pytest.mark.parametrize("damage", ["report.json", "state.json", "dataset_info.json", "cut", "rows lost"])
def test_a_damaged_cache_is_made_anew(load, tmp_path, damage):
    first = load(tiny.ROWS).train[:]
    folder = next((tmp_path / "cache").iterdir())
    if damage == "cut":
        arrow = next(folder.glob("*.arrow"))
        arrow.write_bytes(arrow.read_bytes()[:100])
    elif damage == "rows lost":
        _lose_rows(next(folder.glob("*.arrow")))
    else:
        (folder / damage).unlink()
    assert load(tiny.ROWS).train[:] == first


def test_rows_that_an_earlier_version_kept_are_taken(load, tmp_path):
    """Its report had `"file reason"` → lines where there are records now."""
    rows = [*tiny.ROWS, {"instruction": "Hi", "output": ""}]
    report = load(rows).report
    kept = next((tmp_path / "cache").iterdir()) / "report.json"
    stored = json.loads(kept.read_text(encoding="utf-8"))
    place = f"{tmp_path / 'rows.jsonl'} has an empty output"
    earlier = {name: value for name, value in stored.items() if name not in ("records", "totals")} | {
        "places": {place: [len(rows)]}, "kinds": {place: "with nothing to train"}, "counted": {place: 1},
        "untrained_at": {}, "shortened_at": {},
    }  # fmt: skip
    kept.write_text(json.dumps(earlier), encoding="utf-8")
    assert load(rows).report == report
    assert json.loads(kept.read_text(encoding="utf-8")) == earlier  # they were not made anew


def _lose_rows(arrow):
    """Leaves three rows, in a file that can be read as well as before."""
    import pyarrow

    table = pyarrow.ipc.open_stream(arrow.read_bytes()).read_all()
    with pyarrow.ipc.new_stream(str(arrow), table.schema) as writer:
        writer.write_table(table.slice(0, 3))


def test_another_tokenizer_makes_the_rows_anew(load, tmp_path, tokenizer):
    import copy

    load(tiny.ROWS)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["capital"])
    args, train_args = parse_args(
        ["--train_data_path", str(tmp_path / "rows.jsonl"), "--cache_dir", str(tmp_path / "cache")]
    )
    data = get_task("sft").load_datasets(args, train_args, get_template("qwen", other), other)
    assert data.train[0]["input_ids"] != load(tiny.ROWS).train[0]["input_ids"]


def test_another_end_of_text_makes_the_rows_anew(tmp_path, tiny_models, tokenizer):
    """The same vocabulary, another of its tokens as eos: what ends each text is another id."""
    import copy

    data = write_rows(tmp_path / "texts.jsonl", [{"text": "The fox."}])
    flags = ["--train_args_path", "train_args/pretrain/base.py", "--train_data_path", data, "--packing", "false"]
    flags += ["--model_name_or_path", tiny_models(), "--cache_dir", str(tmp_path / "cache")]
    ends = []
    for token in ("<|endoftext|>", "<|im_end|>"):
        other = copy.deepcopy(tokenizer)
        other.eos_token = token
        row = get_task("pretrain").load_datasets(*parse_args(flags), None, other).train[0]
        ends.append(other.convert_ids_to_tokens(row["input_ids"][-1]))
    assert ends == ["<|endoftext|>", "<|im_end|>"]


def test_special_tokens_in_pretraining_text_are_plain_text_unless_allowed(tmp_path, tiny_models, tokenizer):
    text = "A turn ends with <|im_end|>, a text with <|endoftext|>."
    data = write_rows(tmp_path / "texts.jsonl", [{"text": text}, {"text": "The fox."}])
    flags = ["--train_args_path", "train_args/pretrain/base.py", "--train_data_path", data, "--packing", "false"]
    flags += ["--model_name_or_path", tiny_models(), "--cache_dir", str(tmp_path / "cache")]
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    for more, counts in (([], [0, 1]), (["--allow_special_tokens_in_content", "true"], [1, 2])):
        first, other = get_task("pretrain").load_datasets(*parse_args([*flags, *more]), None, tokenizer).train
        assert [first["input_ids"].count(end) for end in ends] == counts
        assert tokenizer.decode(first["input_ids"]) == f"{text}<|endoftext|>" and first["labels"] == first["input_ids"]
        assert other["input_ids"] == [*tokenizer("The fox.")["input_ids"], ends[1]]


def test_evaluation_rows_of_their_own(load, tmp_path):
    other = write_rows(tmp_path / "eval.jsonl", tiny.ROWS[:3])
    data = load(tiny.ROWS, "--eval_data_path", other)
    assert (len(data.train), len(data.eval), data.rows_trained()) == (8, 3, 8)
    assert data.eval[:] == load(tiny.ROWS[:3]).train[:]


def test_on_bad_row_error_stops_for_malformed_rows_too(load):
    with pytest.raises(UserError, match="no field 'output'"):
        load(BAD, "--on_bad_row", "error")


def test_line_numbers_of_lists(load, tmp_path):
    import json

    (tmp_path / "a.json").write_text(json.dumps([tiny.ROWS[0], {"instruction": "x"}]))
    with pytest.raises(UserError, match="a.json:2 has no field"):
        load(str(tmp_path / "a.json"))
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([{"instruction": "x", "output": "y"}, {"instruction": "x", "output": None}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet:2 has null"):
        load(str(tmp_path / "a.parquet"))


def test_a_byte_order_mark_is_no_part_of_the_first_row(load, tmp_path):
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"instruction": "a", "output": "b"}\r\n')
    assert load(str(tmp_path / "bom.jsonl")).report.kept == 1


def test_a_csv_answer_that_looks_like_a_list_is_text(load, tmp_path):
    (tmp_path / "a.csv").write_text('instruction,output\nprimes,"[2, 3, 5]"\n')
    assert load(str(tmp_path / "a.csv")).report.kept == 1
