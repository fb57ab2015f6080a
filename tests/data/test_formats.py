"""Every row format is read as the messages it stands for, and no field of a row is lost without a word."""

import itertools
import json

import pytest
from conftest import ROOT

from utils.data import fields
from utils.data.bad_rows import BadRow, EmptyRow
from utils.data.conversations import to_messages, to_text
from utils.data.fields import unread_fields
from utils.data.files import read_rows
from utils.data.formats import CONVERSATION_FORMATS, PAIR_FORMATS, TEXT_FORMATS, find_format
from utils.data.json_rows import read_json
from utils.data.pairs import to_pair
from utils.data.row_types import CONVERSATION, PAIR, PLAIN_TEXT
from utils.infer.prompts import to_prompt
from utils.template.messages import METADATA_FIELDS


def user(text):
    return {"role": "user", "content": text}


def system(text):
    return {"role": "system", "content": text}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


SUM, SUM_OF = [user("What is 7 + 8?"), answer("15")], [user("Add the numbers.\n7, 8"), answer("15")]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": {}}}
BARE_CALL, BARE_TOOL = CALL["function"], TOOL["function"]
# name of a format → what its example stands for, and other rows of it with what they stand for
CONVERSATIONS = {
    "OpenAI, Hugging Face": (SUM, [
        ({"messages": json.dumps([system("Be brief."), user("Hi"), answer("Hello")])},
         [system("Be brief."), user("Hi"), answer("Hello")]),
        ({"messages": [{"role": "Developer", "content": "Be brief."}, {"role": "USER", "content": [
            {"type": "text", "text": "Hi"}, {"type": "text", "text": " there"}]}, answer("Hello")]},
         [system("Be brief."), user("Hi there"), answer("Hello")]),
        ({"messages": [user("Weather in Oslo?"),
                       {"role": "assistant", "content": None,
                        "function_call": {"name": "weather", "arguments": '{"city": "Oslo"}'}},
                       {"role": "function", "name": "weather", "content": "4 degrees"}, answer("It is 4 degrees.")],
          "functions": [BARE_TOOL], "parallel_tool_calls": False},
         [{**user("Weather in Oslo?"), "tools": [TOOL]}, answer("", tool_calls=[CALL]),
          {"role": "tool", "name": "weather", "content": "4 degrees"}, answer("It is 4 degrees.")]),
    ]),
    "messages, in the singular": (SUM, [({"message": [user("Hi"), answer("Hello")]}, [user("Hi"), answer("Hello")])]),
    "ShareGPT": (SUM, [
        ({"system": "Be brief.", "tools": json.dumps([BARE_TOOL]), "conversations": [
            {"from": "Human", "value": "Weather in Oslo?"},
            {"from": "function_call", "value": json.dumps(BARE_CALL)}, {"from": "observation", "value": "4 degrees"},
            {"from": "GPT", "value": "It is 4 degrees."}]},
         [{**system("Be brief."), "tools": [TOOL]}, user("Weather in Oslo?"), answer("", tool_calls=[CALL]),
          {"role": "tool", "content": "4 degrees"}, answer("It is 4 degrees.")]),
        ({"conversations": [{"from": "user", "value": "Twice."},
                            {"from": "tool_call", "value": json.dumps([BARE_CALL] * 2)},
                            {"from": "tool_response", "value": "4"}, {"from": "bot", "value": "Done."}]},
         [user("Twice."), answer("", tool_calls=[CALL, CALL]), {"role": "tool", "content": "4"}, answer("Done.")]),
    ]),
    "Firefly, several turns": (SUM, [
        ({"conversation_id": 1, "conversation": [{"human": "Hi", "assistant": "Hello"},
                                                 {"human": "And?", "assistant": "No."}]},
         [user("Hi"), answer("Hello"), user("And?"), answer("No.")])]),
    "ShareGPT, in the singular": (SUM, [
        ({"conversation": [{"role": "human", "value": "Hi"}, {"from": "bot", "content": "Hello"}]},
         [user("Hi"), answer("Hello")])]),
    "UltraChat": (SUM, [
        ({"id": "0", "data": ["Hi", "Hello", "And?", "Nothing."]},
         [user("Hi"), answer("Hello"), user("And?"), answer("Nothing.")])]),
    "Alpaca": (SUM_OF, [
        ({"instruction": "", "input": "Hi", "output": "Hello"}, [user("Hi"), answer("Hello")]),
        ({"instruction": "Hi", "system": "Be brief.", "history": [user("a"), answer("b")], "output": "Hello"},
         [system("Be brief."), user("a"), answer("b"), user("Hi"), answer("Hello")])]),
    "Dolly": (SUM_OF, [
        ({"instruction": "Hi", "context": "", "response": "Hello", "category": "open_qa"},
         [user("Hi"), answer("Hello")])]),
    "TRL": (SUM, [
        ({"prompt": [system("Be brief."), user("Hi"), answer("Hello"), user("Again")],
          "completion": [answer("Hello!")]},
         [system("Be brief."), user("Hi"), answer("Hello", train=False), user("Again"), answer("Hello!")]),
        ({"prompt": [user("Hi"), answer("Yes?"), user("Bye")], "completion": "Hello"},
         [user("Hi"), answer("Yes?", train=False), user("Bye"), answer("Hello")]),
        ({"prompt": "Hi", "history": [["a", "b"]], "completion": answer("Hello")},
         [user("a"), answer("b"), user("Hi"), answer("Hello")]),
        ({"prompt": json.dumps([user("Hi")]), "completion": json.dumps([answer("Hello")])},
         [user("Hi"), answer("Hello")]),
        ({"prompt": json.dumps([user("Hi")]), "completion": "Hello"}, [user("Hi"), answer("Hello")]),
        ({"prompt": "Hi", "completion": json.dumps([answer("Hello")])},
         [user("Hi"), answer(json.dumps([answer("Hello")]))])]),
    "prompt and response": (SUM, [
        ({"prompt": "Hi", "response": answer("Hello")}, [user("Hi"), answer("Hello")])]),
    "ms-swift": (SUM, [
        ({"system": "Be brief.", "query": "Hi", "response": "Hello", "history": [["a", "b"]]},
         [system("Be brief."), user("a"), answer("b"), user("Hi"), answer("Hello")])]),
    "question and answer": (SUM, [({"question": "Hi", "answer": "Hello"}, [user("Hi"), answer("Hello")])]),
    "OpenOrca": ([system("Be brief."), *SUM], [
        ({"id": "flan.1", "system_prompt": "", "question": "Hi", "response": "Hello"}, [user("Hi"), answer("Hello")])]),
    "Firefly": (SUM, [({"kind": "greeting", "input": "Hi", "target": "Hello"}, [user("Hi"), answer("Hello")])]),
    "input and output": (SUM, [
        ({"system": "Be brief.", "input": "Hi", "output": "Hello"},
         [system("Be brief."), user("Hi"), answer("Hello")])]),
}  # fmt: skip


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": [answer(chosen)], "rejected": [answer(rejected)]}


ASK, GREET = [user("What is 7 + 8?")], pair([user("Hi")], "Hello", "No.")
PAIRS = {
    "TRL": (pair(ASK, "15", "16"), [
        ({"prompt": "Hi", "chosen": [user("Hi"), answer("Hello")], "reject": "No."}, GREET),
        ({"prompt": "Hi", "question": "Hi", "chosen": "Hello", "rejected": "No.", "reject": None}, GREET),
        ({"prompt": json.dumps([user("Hi")]), "chosen": json.dumps([answer("Hello")]),
          "rejected": json.dumps([answer("No.")])}, GREET)]),
    "Alpaca with two answers": (pair([user("Add the numbers.\n7, 8")], "15", "16"), [
        ({"instruction": "Hi", "input": "", "chosen": "Hello", "rejected": "No."}, GREET)]),
    "Orca": (pair([system("Be brief."), *ASK], "15", "16"), [
        ({"system": "", "prompt": None, "question": "Hi", "chosen": "Hello", "rejected": "No."}, GREET)]),
    "messages with two answers": (pair(ASK, "15", "16"), [
        ({"messages": json.dumps([user("Hi")]), "chosen": "Hello", "rejected": "No."}, GREET)]),
    "ShareGPT with two answers": (pair(ASK, "15", "16"), [
        ({"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Hello"},
          "rejected": [{"from": "gpt", "value": "No."}]}, GREET)]),
    "OpenAI": (pair(ASK, "15", "16"), [
        ({"input": {"messages": [user("Hi")], "tools": [BARE_TOOL], "parallel_tool_calls": True},
          "preferred_output": [answer("Hello")], "non_preferred_output": [answer("No.")]},
         {**GREET, "prompt": [{**user("Hi"), "tools": [TOOL]}]}),
        ({"input": json.dumps({"messages": [user("Hi")], "tools": None}), "tools": [TOOL],
          "preferred_output": json.dumps([answer("Hello")]), "non_preferred_output": json.dumps([answer("No.")])},
         {**GREET, "prompt": [{**user("Hi"), "tools": [TOOL]}]})]),
    "ms-swift": (pair(ASK, "15", "16"), [
        ({"messages": [system("Be kind."), user("Hi"), answer("Hello")], "rejected_response": "No."},
         {**GREET, "prompt": [system("Be kind."), user("Hi")]})]),
    "HH-RLHF": (pair(ASK, "15", "16"), [
        ({"chosen": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Human: is a word\n\nOf two lines.\n\nAssistant: Hello",
          "rejected": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Human: is a word\n\nOf two lines.\n\nAssistant: No."},
         pair([user("Hi"), answer("Yes?"), user("Human: is a word\n\nOf two lines.")], "Hello", "No."))]),
    "HH-RLHF, prompt apart": (pair(ASK, "15", "16"), [
        ({"prompt": "\n\nHuman: Hi\n\nAssistant:", "response": " Hello", "chosen": " Hello", "rejected": " No."},
         GREET)]),
    "UltraFeedback: two conversations that begin alike": (pair(ASK, "15", "16"), [
        ({"prompt": "Hi", "messages": [user("Hi"), answer("Hello")], "chosen": [user("Hi"), answer("Hello")],
          "rejected": [user("Hi"), answer("No.")], "score_chosen": 8.0}, GREET),
        ({"prompt": None, "chosen": [user("Hi"), answer("Hello")], "rejected": [user("Hi"), answer("No.")]}, GREET)]),
    "instruction with a list of a good and a bad answer": (pair(ASK, "15", "16"), [
        ({"instruction": "Hi", "input": "", "output": ["Hello", "No."]}, GREET)]),
}  # fmt: skip
TEXTS = {
    "text": ("Pears ripen in autumn.", [({"text": "Hi", "id": 1}, "Hi")]),
    "content": ("Pears ripen in autumn.", [({"content": "def f(): ...", "repo": "a/b"}, "def f(): ...")]),
}
TABLES = [
    (CONVERSATION_FORMATS, CONVERSATIONS, to_messages),
    (PAIR_FORMATS, PAIRS, to_pair),
    (TEXT_FORMATS, TEXTS, to_text),
]
CASES = [
    pytest.param(form, *expected[form.name], read, id=f"{read.__name__}-{form.name}")
    for formats, expected, read in TABLES
    for form in formats
]


@pytest.mark.parametrize(("form", "expected", "others", "read"), CASES)
def test_a_row_of_each_format_is_read(form, expected, others, read):
    assert read(form.example) == expected
    for row, messages in others:
        assert read(row) == messages


@pytest.mark.parametrize(("form", "expected", "others", "read"), CASES)
def test_the_docs_show_an_example_of_each_format(form, expected, others, read):
    pages = {to_messages: "data.md", to_text: "data.md", to_pair: "preferences.md"}
    example = json.dumps(form.example, ensure_ascii=False)
    for folder in ("docs", "docs/zh"):
        assert example in (ROOT / folder / pages[read]).read_text(encoding="utf-8"), (
            f"{folder}/{pages[read]}: {example}"
        )


@pytest.mark.parametrize(("form", "expected", "others", "read"), CASES)
def test_a_file_of_one_row_is_that_row(form, expected, others, read, tmp_path):
    (tmp_path / "row.json").write_text(json.dumps(form.example, indent=1), encoding="utf-8")
    rows = list(read_json(str(tmp_path / "row.json")))
    assert [(raw.value, raw.problem) for raw in rows] == [(form.example, None)]


@pytest.mark.parametrize(
    ("form", "expected", "others", "read"), [case for case in CASES if case.values[3] is not to_text]
)
def test_a_row_of_each_format_is_a_prompt_too(form, expected, others, read):
    messages = [*expected["prompt"], *expected["chosen"]] if read is to_pair else expected
    prompt, _, reference = to_prompt(form.example)
    assert [*prompt, answer(reference)] == messages
    if form.answers and read is to_messages:
        assert to_prompt({form.question: form.example[form.question]})[2] is None
    for row, stands_for in others:
        messages = [*stands_for["prompt"], *stands_for["chosen"]] if read is to_pair else stands_for
        turns = [{key: value for key, value in turn.items() if key not in ("train", "tools")} for turn in messages]
        prompt, tools, reference = to_prompt(row)
        assert [*prompt, answer(reference)] == turns and tools == messages[0].get("tools")


# names that matter somewhere, with values that a row may have there
NAMES = sorted(
    {name for formats, *_ in TABLES for form in formats for name in form.reads}
    | {*fields._CONVERSATION, *fields._PART_OF_QUESTION, *fields.REFUSED, "label", "score", "notes", "reject"}
)
VALUES = ["Zx.", 7, ["Zx."], [user("Zx.")], answer("Zx."), [["Zx.", "Zx."]], json.dumps([user("Zx.")]), {"Zx.": "Zx."}]


@pytest.mark.parametrize(("form", "expected", "others", "read"), CASES)
@pytest.mark.parametrize("name", NAMES)
def test_no_field_is_lost_without_a_word(form, expected, others, read, name):
    """A field is refused, seen in what is read, known to describe the row, or among those that the log names."""
    row_type = {to_messages: CONVERSATION, to_pair: PAIR, to_text: PLAIN_TEXT}[read]
    for row, value in itertools.product([form.example, *(row for row, _ in others)], VALUES):
        row = {**row, name: value}
        try:
            found = json.dumps(read(row))
        except BadRow:
            continue
        seen = "Zx." in found or (value == 7 and "7" in found.replace("7 + 8", "").replace("7, 8", ""))
        assert seen or name in METADATA_FIELDS or name in row_type.unread(row), (row, found)


def test_what_a_near_miss_lacks_is_named():
    for row, said in [
        ({"instruction": "Hi"}, "has no field 'output' or 'response'"),
        ({"prompt": "Hi"}, "has no field 'completion' or 'response'"),
        ({"data": [["Hi"], "Hello"]}, "has the fields ['data']; expected one of {messages}, "),
        ({"role": "user", "content": "Hi"}, "has the fields ['content', 'role']"),
    ]:
        with pytest.raises(BadRow) as error:
            to_messages(row)
        assert said in str(error.value)


def test_a_row_with_the_fields_of_two_formats_is_read_by_the_one_with_values():
    row = {"messages": None, "instruction": "", "query": "Hi", "response": "Hello", "output": float("nan")}
    assert find_format(row, CONVERSATION_FORMATS).name == "ms-swift"
    assert to_messages(row) == [user("Hi"), answer("Hello")]
    assert unread_fields(row, CONVERSATION.fields_read(row)) == []


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": [user("Sum")], "input": "7, 8", "completion": "15"}, "has 'input' beside the turns in 'prompt'"),
        ({"instruction": [user("Sum")], "context": "7", "response": "7"}, "has 'context' beside the turns in 'instr"),
        ({"prompt": user("Sum"), "input": "7", "chosen": "a", "rejected": "b"}, "has 'input' beside the turns in 'pro"),
        ({"instruction": [user("Sum")], "context": "7", "chosen": "a", "rejected": "b"}, "has 'context' beside 'instr"),
        ({"instruction": "Answer.", "question": "What is 7 + 8?", "output": "15"}, "has a field 'question', which is"),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": "{}",
                                                               "tool_calls": [BARE_CALL]}]}, "keep one of them"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi", "image_url": "x.png"}]},
                       answer("Hello")]}, "turn 1 has in 'content' a part with 'image_url', which is not read"),
        ({"messages": '[{"role": "user", "content": "a", "content": "b"}]'}, "a text in 'messages'"),
        ({"messages": [user("Hi"), answer("", tool_calls=[{"type": "function", "function": {"arguments": "{}"}}])]},
         "turn 2 has a tool call without the name of a function"),
        ({"messages": [user("Hi"), answer("Hello", loss_mask=0)]}, "turn 2 has 'loss_mask' 0, which is not read"),
        ({"messages": [user("Hi"), answer("Hello", ignore=True)]}, "turn 2 has 'ignore' True, which is not read"),
        ({"input": {"messages": ASK, "seed": 3}, "preferred_output": [answer("a")], "non_preferred_output": "b"},
         "has 'seed' in 'input', which is not read"),
    ],
)  # fmt: skip
def test_what_has_no_place_beside_turns_is_refused(row, said):
    with pytest.raises(BadRow) as error:
        (to_pair if {"chosen", "preferred_output"} & row.keys() else to_messages)(row)
    assert said in str(error.value) and not isinstance(error.value, EmptyRow)


def test_a_text_beside_a_call_is_kept_and_ids_stand_outside_the_function():
    turns = [user("Hi"), {"from": "function_call", "value": json.dumps(BARE_CALL), "content": "Let me look."}]
    assert to_messages({"conversations": turns})[1] == answer("Let me look.", tool_calls=[CALL])
    flat = {"id": "c1", "type": "function", **BARE_CALL}
    row = {"messages": [user("Hi"), {"role": "assistant", "tool_calls": [flat], "weight": float("nan")}],
           "tools": [{"type": "function", **BARE_TOOL}]}  # fmt: skip
    messages = to_messages(row)
    assert messages[0]["tools"] == [TOOL] and messages[1]["tool_calls"] == [{**CALL, "id": "c1"}]
    assert "tools" not in to_messages({**row, "tools": "null"})[0]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user("Hi"), answer("Hello")], "rejected_response": ""},
        {"messages": json.dumps([user("Hi"), answer("Hello")]), "rejected_response": " "},
        {"input": {"messages": ASK}, "preferred_output": [], "non_preferred_output": [answer("b")]},
        {"prompt": "Hi", "chosen": "", "rejected": "No."},
    ],
)
def test_an_empty_answer_of_a_pair_has_nothing_to_train(row):
    with pytest.raises(EmptyRow, match="has an empty"):
        to_pair(row)


def test_a_prompt_is_asked_with_all_that_belongs_to_it():
    for row in ({"question": "Who wrote it?", "context": "Ann did.", "answer": "Ann"},
                {"prompt": [user("Hi")], "history": [["a", "b"]], "completion": "Hello"}):  # fmt: skip
        with pytest.raises(BadRow):
            to_prompt(row)
    assert to_prompt({"prompt": "Hi", "output": "Hello"})[2] == "Hello"
    assert to_prompt({"question": "Hi", "answer": "", "response": "Hello"})[2] == "Hello"
    assert to_prompt({"prompt": [user("Hi")], "completion": [answer("Hello")]})[2] == "Hello"
    assert to_prompt({"instruction": "Hi", "output": "Hello", "rejected": ""})[2] == "Hello"


def test_an_object_around_rows_is_not_taken_for_a_row(tmp_path):
    def rows_of(value):
        (tmp_path / "file.json").write_text(json.dumps(value), encoding="utf-8")
        return [raw.problem or raw.value for raw in read_json(str(tmp_path / "file.json"))]

    row = {"instruction": "Hi", "output": "Hello"}
    assert rows_of({"code": 0, "message": "success", "data": [row]}) == [row]
    assert to_messages({**row, "message": "a commit"}) == [user("Hi"), answer("Hello")]
    (problem,) = rows_of({"data": ["one", "two"], "label": ["x", "y"]})
    assert problem.startswith("is one object of columns")


def test_a_cell_of_a_csv_file_is_turns_or_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('instruction,input,output\nFix it,"{""a"": 1}","{""name"": ""Bob""}"\n', encoding="utf-8")
    (raw,) = read_rows(str(path))
    assert to_messages(raw.value) == [user('Fix it\n{"a": 1}'), answer('{"name": "Bob"}')]
