"""Results of tools in the order of their calls, and calls of the tools that a row has."""

import copy

import pytest

from utils.data.bad_rows import BadRow
from utils.data.calls import order_results
from utils.data.conversations import to_messages
from utils.data.pairs import to_pair
from utils.infer.prompts import to_prompt

TOOLS = [{"type": "function", "function": {"name": name, "description": "D."}} for name in ("get_weather", "add")]
QUESTION, ANSWER = {"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}


def calling(*calls, **more):
    """An answer with calls, each an id or None, or a pair of an id and a name."""
    pairs = [call if isinstance(call, tuple) else (call, "add") for call in calls]
    made = [{"type": "function", "function": {"name": name, "arguments": {}}} | ({"id": call_id} if call_id else {})
            for call_id, name in pairs]  # fmt: skip
    return {"role": "assistant", "content": "", "tool_calls": made, **more}


def result(text, call_id=None, name=None):
    own = {"tool_call_id": call_id, "name": name}
    return {"role": "tool", "content": text} | {key: value for key, value in own.items() if value}


def results_of(turns):
    return [message["content"] for message in to_messages({"messages": [QUESTION, *turns, ANSWER]})
            if message["role"] == "tool"]  # fmt: skip


@pytest.mark.parametrize(("turns", "wanted"), [
    ([calling("a", "b"), result("B", "b"), result("A", "a")], ["A", "B"]),
    ([calling("a", "b"), result("A", "a"), result("B", "b")], ["A", "B"]),
    ([calling("a", "b", "c"), result("C", "c"), result("A", "a"), result("B", "b")], ["A", "B", "C"]),
    ([calling("a"), calling("b"), result("B", "b"), result("A", "a")], ["A", "B"]),  # one turn for each call
    ([calling("a"), result("A", "a"), calling("a"), result("B", "a")], ["A", "B"]),  # an id used again
    ([calling("a", "a"), result("A", "a"), result("B", "a")], ["A", "B"]),
    ([calling("a", "b"), result("A"), result("B")], ["A", "B"]),
    ([calling(None, None), result("A", "x"), result("B", "y")], ["A", "B"]),
    ([calling((None, "f"), (None, "g")), result("G", name="g"), result("F", name="f")], ["F", "G"]),
    ([calling("a"), QUESTION, result("A", "a")], ["A"]),  # after another question
    ([calling("a"), ANSWER, calling("b"), result("B", "b")], ["B"]),
    ([ANSWER, result("A")], ["A"]),  # its call is a text
])  # fmt: skip
def test_results_follow_the_order_of_their_calls(turns, wanted):
    assert results_of(turns) == wanted


@pytest.mark.parametrize(("turns", "problem"), [
    ([calling("a"), result("A", "z")], "turn 3 is the result of a tool with the 'tool_call_id' 'z'"),
    ([calling("a"), result("A", "a"), result("B", "a")], "turn 4 is the result of a tool, the second one of the call"),
    ([calling("a", "b"), result("A", "a"), result("B", "a")], "turn 4 is the result of a tool, the second one"),
    ([calling(None), result("A"), result("B")], "turn 4 is the result of a tool, and there is no earlier call"),
    ([result("A", "a")], "turn 2 is the result of a tool, and there is no earlier call"),
    ([result("A"), calling("a")], "turn 2 is the result of a tool, and there is no earlier call"),
    ([calling("a", "b"), result("B", "b")], "turn 2 has no result of its call 1"),
    ([calling("a", "b"), result("B", "b"), ANSWER, QUESTION], "turn 2 has no result of its call 1"),
])  # fmt: skip
def test_a_result_without_its_call_is_refused(turns, problem):
    with pytest.raises(BadRow) as error:
        results_of(turns)
    assert str(error.value).startswith(problem)


def test_the_messages_themselves_are_not_changed():
    turns = [QUESTION, calling("a", "b"), result("B", "b"), result("A", "a")]
    before = copy.deepcopy(turns)
    assert order_results(turns) == [*turns[:2], turns[3], turns[2]]
    assert turns == before


def test_pairs_and_prompts_are_ordered_too():
    turns = [QUESTION, calling("a", "b"), result("B", "b"), result("A", "a")]
    pair = to_pair({"prompt": turns, "chosen": [*turns[1:], ANSWER], "rejected": "R."})
    assert [message["content"] for message in pair["prompt"]] == ["Q?", "", "A", "B"]
    assert [message["content"] for message in pair["chosen"]] == ["", "A", "B", "A."]
    assert [message["content"] for message in to_prompt({"messages": turns})[0]] == ["Q?", "", "A", "B"]


def test_a_call_of_another_function_than_the_rows_tools_is_refused():
    row = {"tools": TOOLS, "messages": [QUESTION, calling(("a", "get_wether"))]}
    with pytest.raises(BadRow) as error:
        to_messages(row)
    assert str(error.value) == (
        "turn 2 calls the function 'get_wether', which is not among its 'tools'. Did you mean 'get_weather'? "
        "The tools are 'get_weather', 'add'"
    )
    to_messages({"messages": row["messages"]})  # without tools
    to_messages({**row, "messages": [QUESTION, calling(("a", "get_wether"), weight=0), result("No.", "a"), ANSWER]})
    to_messages({**row, "tools": [*TOOLS, {"type": "get_wether"}]})  # a built-in one


def test_a_rejected_answer_may_call_a_function_that_does_not_exist():
    right, wrong = [calling(("a", "get_weather"))], [calling(("a", "get_wether"))]
    pair = {"tools": TOOLS, "prompt": [QUESTION], "chosen": right, "rejected": wrong}
    assert to_pair(pair)["rejected"][0]["tool_calls"] == wrong[0]["tool_calls"]
    with pytest.raises(BadRow, match="^turn 2 calls the function 'get_wether'"):
        to_pair({**pair, "chosen": wrong, "rejected": right})
