"""`--columns` reads fields under other names, in training and in every command that looks at the rows."""

import json
from types import SimpleNamespace

import pytest
import tiny
from conftest import write_rows

from utils.args import parse_args
from utils.data.bad_rows import BadRow, EmptyRow
from utils.data.columns import rename_fields, with_columns
from utils.data.conversations import to_messages
from utils.data.row_types import CONVERSATION, PAIR
from utils.runtime.errors import UserError

NAMES = {"instruction": "frage", "output": "antwort"}
FLAG = ["--columns", json.dumps(NAMES)]
ROWS = [{"frage": row["instruction"], "antwort": row["output"]} for row in tiny.ROWS if row.keys() <= NAMES.keys()]


def test_fields_are_renamed():
    assert rename_fields({"frage": "Hi", "id": 3}, NAMES) == {"instruction": "Hi", "id": 3}
    assert rename_fields({"a": 1, "b": 2}, {"a": "b", "b": "a"}) == {"b": 1, "a": 2}
    assert rename_fields({"instruction": "", "frage": "Hi"}, NAMES) == {"instruction": "Hi"}
    assert rename_fields({"frage": "Hi", "instruction": None}, NAMES) == {"instruction": "Hi"}
    assert rename_fields("Hi", NAMES) == "Hi"
    with pytest.raises(BadRow, match="has 'instruction' beside 'frage', which --columns reads as 'instruction'"):
        rename_fields({"frage": "Hi", "instruction": "Ho"}, NAMES)


def test_a_row_that_lacks_a_named_field_says_so():
    read = with_columns(to_messages, NAMES)
    with pytest.raises(BadRow, match="has no field 'output' or 'response'; it has no 'antwort', which --columns names"):
        read({"frage": "Hi", "Antwort": "Hello"})
    with pytest.raises(EmptyRow, match="has an empty output"):
        read({"frage": "Hi", "antwort": ""})


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("frage", "is not JSON"),
        ('["frage"]', "is not an object such as"),
        ('{"instruction": 3}', "is not an object such as"),
        ('{"instruction": "a", "output": "a"}', "reads 'a' as two fields"),
        ('{"output": "a", "output": "b"}', "is not JSON"),
        ('{"instrction": "frage"}', "names 'instrction', a field that no format of a conversation has. Did you mean"),
        ('{"frage": "instruction"}', "has. The name in a format comes first."),
    ],
)
def test_a_value_that_is_no_mapping_is_refused(value, said, tiny_models, tmp_path):
    with pytest.raises(UserError) as error:
        parse_args(["--model_name_or_path", tiny_models(), "--train_data_path", write_rows(tmp_path / "a.jsonl", ROWS),
                    "--output_dir", str(tmp_path / "run"), "--columns", value])  # fmt: skip
    assert said in str(error.value)


def test_unread_fields_keep_the_names_of_the_file():
    row_type = CONVERSATION.with_columns(NAMES)
    assert row_type.unread({"frage": "Hi", "antwort": "Hello", "note": 3}) == ["note"]
    assert row_type.unread({"instruction": "Hi", "antwort": "Hello", "note": 3}) == ["note"]
    pair = {"chosen": [{"role": "user", "content": "Hi"}], "rejected": [], "prompt": "Hi"}
    assert PAIR.unread({**pair, "messages": pair["chosen"]}) == [] and PAIR.unread({**pair, "messages": [3]}) != []
    assert CONVERSATION.with_columns({}) is CONVERSATION


def test_rows_are_those_of_a_file_with_the_usual_names(tiny_models, tokenizer, tmp_path):
    from utils.template import get_template

    def prepared(file, *flags):
        args, train_args = parse_args(["--model_name_or_path", tiny_models(), "--train_data_path", file,
                                       "--output_dir", str(tmp_path / "run"), *flags])  # fmt: skip
        return args.task.load_datasets(args, train_args, get_template("qwen", tokenizer), tokenizer)

    file = write_rows(tmp_path / "named.jsonl", ROWS)
    usual = write_rows(tmp_path / "usual.jsonl", [rename_fields(row, NAMES) for row in ROWS])
    assert prepared(file, *FLAG).train[:] == prepared(usual).train[:]
    assert prepared(file, *FLAG).report.unread == {}
    file = write_rows(tmp_path / "more.jsonl", [*ROWS, *ROWS])
    misspelt = ["--columns", json.dumps({**NAMES, "system": "sytem"})]
    for _ in range(2):  # the second time from the cache
        with pytest.raises(UserError, match="--columns names 'sytem', which no row of --train_data_path has"):
            prepared(file, *misspelt)
    given = write_rows(tmp_path / "given.jsonl", [*ROWS, {**ROWS[0], "sytem": "Be brief."}])
    assert len(prepared(given, *misspelt, "--eval_data_path", file).eval) == 2 * len(ROWS)  # only warned of
    swapped = ["--columns", '{"instruction": "antwort", "output": "frage"}']
    assert prepared(file, *swapped).train[:] != prepared(usual).train[:]  # another key in the cache


def test_every_command_reads_them(tiny_models, tmp_path, capsys):
    from utils.prove import model_checks
    from utils.script import doctor, explain, show_data

    flags = ["--model_name_or_path", tiny_models(), "--train_data_path", write_rows(tmp_path / "a.jsonl", ROWS),
             "--output_dir", str(tmp_path / "run"), "--max_len", "256", *FLAG]  # fmt: skip
    show_data.main([*flags, "--rows", "1"])
    assert ROWS[0]["antwort"] in capsys.readouterr().out
    doctor.main(flags)
    said = capsys.readouterr().out
    assert "ready to train" in said and "ROW_UNREADABLE" not in said
    explain.main(flags)
    assert f"{len(ROWS)} rows" in capsys.readouterr().out
    args, _ = parse_args(flags)
    assert model_checks._prompt_of(SimpleNamespace(args=args), ROWS[0])[2] == ROWS[0]["antwort"]


def test_prompts_and_questions_with_choices_are_read_under_other_names(tmp_path, capsys):
    from utils.evaluate.methods import read_task
    from utils.infer.prompts import read_prompts

    file = write_rows(tmp_path / "a.jsonl", [*ROWS, {"frage": "Hi", "instruction": "Ho"}])
    prompts, (problem,) = read_prompts(file, "--input", NAMES)
    assert [prompt.reference for prompt in prompts] == [row["antwort"] for row in ROWS]
    assert f"a.jsonl:{len(ROWS) + 1} has 'instruction' beside 'frage'" in problem.message
    read_prompts(file, "--input", {"instruction": "frage", "system": "Rolle"})
    assert "--columns names 'Rolle', which no row of --input has" in capsys.readouterr().err
    choices = write_rows(tmp_path / "b.jsonl", [{"frage": "Which?", "optionen": ["a", "b"], "answer": "B"}])
    kind, (row,), problems = read_task(choices, "--eval_data_path", {"question": "frage", "choices": "optionen"})
    assert kind == "choices" and row.answer == 1 and not problems
