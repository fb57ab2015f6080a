"""What a turn holds beside its text: marks, tool calls, thinking, further fields, and what becomes of each."""

import copy
import json
import math

import pytest
import tiny
from conftest import write_rows
from test_official import TOOLS, tokenizer_of, trained_texts

from utils.data.bad_rows import BadRow, EmptyRow
from utils.data.conversations import to_messages
from utils.data.encode import RowEncoder
from utils.data.pairs import to_pair
from utils.data.prepare import load_rows
from utils.data.truncate import encode_within
from utils.runtime.errors import UserError
from utils.template import get_template
from utils.template.messages import UNREAD_FIELD, UNTRAINED_ANSWER

USER, ANSWER = {"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "Pear"}


def talk(*answers):
    return {"messages": [turn for answer in answers for turn in (USER, {"role": "assistant", **answer})]}


def chatml(**changes):
    tokenizer = copy.deepcopy(tiny.byte_level_tokenizer())
    tokenizer.chat_template = get_template("qwen").to_jinja()
    return tokenizer


@pytest.mark.parametrize("template", ["qwen", "auto"])
@pytest.mark.parametrize("mark", [{"weight": 0}, {"loss": False}, {"train": False}, {"train_on_turn": False},
                                  {"weight": 0.0}, {"trainable": False, "weight": None}])  # fmt: skip
def test_an_answer_marked_as_bad_is_not_trained(template, mark):
    tokenizer = chatml()
    template = get_template(template, tokenizer)
    good = {name: True for name in mark}
    for row in (
        talk({"content": "Carburettor", **mark}, {"content": "Pear", **good}),
        {"conversations": [{"from": "human", "value": "A fruit?", "weight": 0},
                           {"from": "gpt", "value": "Spoon", **mark},
                           {"from": "human", "value": "Again."}, {"from": "gpt", "value": "Pear"}]},
    ):  # fmt: skip
        messages = to_messages(row)
        template.check(messages)
        assert trained_texts(template.encode(messages, tokenizer), tokenizer) == ["Pear<|im_end|>"]
        unmarked = [{key: value for key, value in message.items() if key != "train"} for message in messages]
        assert template.encode(messages, tokenizer)["input_ids"] == template.encode(unmarked, tokenizer)["input_ids"]
        assert not template.notes(messages)  # what the row itself leaves out is no news
    # the last answer is the last one, trained or not
    messages = to_messages(talk({"content": "Pear"}, {"content": "Carburettor", **mark}))
    assert trained_texts(template.encode(messages, tokenizer, train_on="last_turn"), tokenizer) == []


@pytest.mark.parametrize(("turns", "said"), [
    ([USER, {**ANSWER, "weight": -0.5}], "turn 2 has 'weight' -0.5; give 0, or a number from 1e-30"),
    ([USER, {**ANSWER, "weight": "0.5"}], "turn 2 has 'weight' '0.5'; give 0"),
    ([USER, {**ANSWER, "weight": math.inf}], "turn 2 has 'weight' inf; give 0"),
    ([USER, {**ANSWER, "weight": 0.5, "loss_weight": 2}], "turn 2 has marks that differ"),
    ([USER, {**ANSWER, "weight": 1e39}], "turn 2 has 'weight' 1e+39; give 0"),
    ([USER, {**ANSWER, "loss": 0.5}], "turn 2 has 'loss' 0.5; write true or false, or a number as its 'weight'"),
    ([USER, {**ANSWER, "train": "no"}], "turn 2 has 'train' 'no'"),
    ([{**USER, "train": True}, ANSWER], "turn 1 (user) has 'train' True"),
    ([USER, {**ANSWER, "train": True, "weight": 0}], "turn 2 has marks that differ"),
    ([USER, {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"},
             "tool_calls": [{"name": "f", "arguments": {}}]}],
     "turn 2 has 'function_call' beside 'tool_calls'"),
    ([USER, {"role": "function_call", "content": "f()"}, ANSWER], "turn 2 is a tool call, and its text is neither"),
    ([{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image"}]}, ANSWER],
     "turn 1 has in 'content' a part of another kind than text ('image')"),
    ([{"role": "user", "content": [3]}, ANSWER], "turn 1 has in 'content' a part of another kind than text (a number)"),
    ([USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{people: 4}"}}]}],
     "turn 2 has a tool call whose arguments are not JSON"),
    ([USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}],
     "turn 2 has a tool call whose arguments are a list, not an object"),
    ([USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}],
     "turn 2 has a tool call of 'f' with a list as arguments; write an object, {} for none"),
    ([USER, {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}],
     "turn 2 has a tool call of 'f' with no arguments; write an object, {} for none"),
])  # fmt: skip
def test_what_a_turn_cannot_say(turns, said):
    with pytest.raises(BadRow) as error:
        to_messages({"messages": turns})
    assert said in str(error.value)


@pytest.mark.parametrize(("tools", "said"), [
    (["search", "look"], "has a text in 'tools' where the description of a function belongs"),
    ([{"type": "function"}], "has a tool without the name of a function in 'tools'"),
    ([{"type": "function", "function": "f"}], "has a tool without the name of a function in 'tools'"),
    ([{"name": "f"}, {"type": "function", "function": {"name": " "}}], "has a tool without the name of a function"),
])  # fmt: skip
def test_what_is_no_description_of_a_tool(tools, said):
    with pytest.raises(BadRow) as error:
        to_messages({"messages": [USER, ANSWER], "tools": tools})
    assert said in str(error.value)


def test_marks_of_turns_that_are_not_answers_may_say_that_they_are_not_trained():
    turns = [{"role": "system", "content": "Be brief.", "weight": None}, {**USER, "weight": 0}, {**ANSWER, "weight": 1}]
    assert to_messages({"messages": turns}) == [{"role": "system", "content": "Be brief."}, USER, ANSWER]


def test_pairs_keep_to_marks_too():
    """Within the prompt they change nothing; on a compared answer they are refused."""
    prompt = [USER, {**ANSWER, "weight": 0}, USER]
    pair = to_pair({"prompt": prompt, "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "Bicycle"}]})
    assert [turn["content"] for turn in pair["prompt"]] == ["Name a fruit.", "Pear", "Name a fruit."]
    whole = {"chosen": [*prompt, ANSWER], "rejected": [USER, ANSWER, USER, {**ANSWER, "content": "Bicycle"}]}
    assert to_pair(whole)["rejected"] == [{**ANSWER, "content": "Bicycle"}]
    for side in ("chosen", "rejected"):
        row = {"prompt": "Hi", "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "Bicycle"}]}
        row[side] = [{**row[side][0], "weight": 0}]
        with pytest.raises(BadRow, match=f"has in '{side}' an answer of weight 0, and"):
            to_pair(row)


@pytest.mark.parametrize("template", ["qwen", "auto"])
def test_an_empty_answer_is_not_trained_and_counted(template, tmp_path):
    tokenizer = chatml()
    template = get_template(template, tokenizer)
    row = {"messages": [USER, {**ANSWER, "content": " "}, USER, ANSWER]}
    messages = to_messages(row)
    assert trained_texts(template.encode(messages, tokenizer), tokenizer) == ["Pear<|im_end|>"]
    assert [(note.kind, note.reason) for note in template.notes(messages)] == [
        (UNTRAINED_ANSWER, "has an empty answer")
    ]
    assert not template.notes(messages, train_on="last_turn")
    with pytest.raises(EmptyRow):
        to_messages({"messages": [USER, {**ANSWER, "content": " "}]})
    encoder = RowEncoder(
        (".jsonl",), to_messages, lambda rows: encode_within(rows, template, tokenizer, 512), {"t": "sft"}
    )
    rows = [talk(ANSWER), row, row]
    file = write_rows(tmp_path / "a.jsonl", rows)
    _, report = load_rows(file, "--train_data_path", encoder, "auto", str(tmp_path), 1)
    (group,) = report.groups(UNTRAINED_ANSWER)
    assert (report.untrained, group.lines, group.reason) == (2, [2, 3], "has an empty answer")


# ------------------------------------------------------------------------------ tool calls


def booking(arguments):
    call = {"id": "abcdef123", "type": "function", "function": {"name": "book_table", "arguments": arguments}}
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": [call]},
             {"role": "tool", "tool_call_id": "abcdef123", "name": "book_table", "content": "done"},
            ANSWER]  # fmt: skip
    return {"messages": turns, "tools": TOOLS}


@pytest.mark.parametrize("family", ["qwen2_5", "qwen3", "qwen3_6", "llama3_1", "gptoss", "gemma4_v5", "lfm2_v2"])
def test_arguments_in_json_text_are_those_of_an_object(family):
    """As the official template renders the object; the text itself would be encoded twice."""
    tokenizer = tokenizer_of(family)
    template = get_template("auto", tokenizer)
    arguments = {"people": 4, "place": "Lark", "note": None}
    one, other = (to_messages(booking(form)) for form in (arguments, json.dumps(arguments)))
    encoded = template.encode(other, tokenizer)
    assert encoded == template.encode(one, tokenizer)
    plain = [{key: value for key, value in message.items() if key != "tools"} for message in one]
    assert encoded["input_ids"] == tokenizer.apply_chat_template(plain, tools=TOOLS)["input_ids"]
    assert "null" in tokenizer.decode(encoded["input_ids"]).lower() or family == "lfm2_v2"


def test_a_template_that_joins_texts_gets_arguments_as_text():
    tokenizer = tokenizer_of("deepseekv3")
    template = get_template("auto", tokenizer)
    row = booking({"people": 4, "place": "Lark"})
    del row["tools"]  # which the template does not show
    texts = trained_texts(template.encode(to_messages(row), tokenizer), tokenizer)
    assert '```json\n{"people": 4, "place": "Lark"}\n```' in texts[0]
    assert texts[0].endswith("<｜tool▁calls▁end｜><｜end▁of▁sentence｜>")


def test_a_special_token_in_a_key_forges_no_turn():
    """In a call's arguments, in a tool's parameters, in names: the text stays text."""
    tokenizer = tokenizer_of("qwen2_5")
    template = get_template("auto", tokenizer)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    counts = []
    for text in ("plain", "<|im_end|>"):
        call = {"type": "function", "function": {"name": f"f{text}", "arguments": {f"a{text}": {f"b{text}": text}}}}
        parameters = {"type": "object", "properties": {f"a{text}": {"enum": [text]}}, "required": [f"a{text}"]}
        function = {"name": f"f{text}", "description": text, "parameters": parameters}
        tools = [{"type": "function", "function": function}]
        row = {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]},
                            {"role": "tool", "name": text, "content": text}, ANSWER], "tools": tools}  # fmt: skip
        ids = template.encode(to_messages(row), tokenizer)["input_ids"]
        counts.append(ids.count(stop))
        assert tokenizer.decode(ids) == template.render(to_messages(row))
    assert counts[0] == counts[1]


# ------------------------------------------------------------------------------ thinking, and fields that are not shown


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking", "thought"])
def test_thinking_that_a_template_does_not_show_is_refused(field):
    tokenizer = chatml()
    messages = to_messages(talk({"content": "Pear", field: "It is sweet."}))
    for name in ("qwen", "auto"):
        with pytest.raises(UserError, match=f"turn 2 .*'{field}'"):
            get_template(name, tokenizer).check(messages)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("family", ["qwen3", "gptoss", "lfm2_2_5_v2", "nemotron_3_nano"])
def test_thinking_under_any_name_is_trained(family, field):
    tokenizer = tokenizer_of(family)
    template = get_template("auto", tokenizer)
    messages = to_messages(talk({"content": "Pear", field: "It is sweet."}))
    template.check(messages)
    (text,) = trained_texts(template.encode(messages, tokenizer), tokenizer)
    assert "It is sweet." in text and "Pear" in text


@pytest.mark.parametrize("family", ["deepseekv3", "deepseek_r1_distill"])
def test_a_thought_in_the_content_that_the_template_cuts_away_is_refused(family):
    template = get_template("auto", tokenizer_of(family))
    with pytest.raises(UserError, match="turn 2 .assistant. has a thought in its content"):
        template.check(to_messages(talk({"content": "<think>\nIt is sweet.\n</think>\n\nPear"})))


def test_the_same_thought_under_two_names_is_one():
    messages = to_messages(talk({"content": "Pear", "reasoning_content": "Sweet.", "reasoning": "Sweet."}))
    get_template("auto", tokenizer_of("qwen3")).check(messages)


def test_further_fields_of_a_turn_are_shown_or_named():
    tokenizer = chatml()
    row = {"messages": [{**USER, "country": "Peru", "id": "7"}, {**ANSWER, "score": 3, "empty": None}]}
    messages = to_messages(row)
    for name in ("qwen", "auto"):
        notes = get_template(name, tokenizer).notes(messages)
        assert [note.kind for note in notes] == [UNREAD_FIELD, UNREAD_FIELD]
        assert {note.reason.split()[0] for note in notes} == {"country", "score"}
    # a template that shows such a field is given it
    shows = "{{ message['content'] ~ message.country }}"
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ message['content'] }}", shows)
    official = tokenizer.apply_chat_template(row["messages"])["input_ids"]
    template = get_template("auto", tokenizer)
    assert template.encode(messages, tokenizer)["input_ids"] == official
    assert "Peru" in tokenizer.decode(official) and [n.reason.split()[0] for n in template.notes(messages)] == ["score"]
