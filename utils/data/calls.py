"""Pairs the results of tools with their calls, and calls with the tools of their row."""

from typing import NamedTuple

from utils.data.bad_rows import BadRow
from utils.runtime.errors import nearest
from utils.template.messages import Message, is_trained_answer


class _Call(NamedTuple):
    """A tool call: the indices of its turn and within that turn, its id and the name of its function, if it has any."""

    turn: int
    index: int
    call_id: str | None
    name: str | None


def order_results(messages: list[Message]) -> list[Message]:
    """Puts the results that follow one another in the order of their calls, by their ids.

    A result without an id belongs to the first call without a result, of the function in its `name` if it has one.
    Most chat formats print no ids, and there the order alone tells which call a result belongs to.

    Args:
        messages: one conversation. Without any `tool_calls` and ids it is left as it is: its calls may be texts.

    Raises:
        BadRow: a result belongs to no call, or a call has none although a later call of the same turn has one.
    """
    if not any(message.get("tool_calls") or message.get("tool_call_id") for message in messages):
        return messages
    ordered: list[Message] = []
    waiting: list[_Call] = []  # calls that have no result yet
    answered: list[tuple[_Call, Message]] = []  # calls of the results that follow one another, with these results
    for turn, message in enumerate(messages):
        if message["role"] == "tool":
            found = _call_of(turn, message, waiting, [call.call_id for call, _ in answered])
            waiting.remove(found)
            answered.append((found, message))
            continue
        ordered += _in_order(answered, waiting)
        answered = []
        ordered.append(message)
        waiting += [_read_call(turn, index, call) for index, call in enumerate(message.get("tool_calls") or [])]
    return ordered + _in_order(answered, waiting)


def _read_call(turn: int, index: int, call: dict) -> _Call:
    function = call.get("function")
    return _Call(turn, index, call.get("id"), function.get("name") if isinstance(function, dict) else None)


def _call_of(turn: int, result: Message, waiting: list[_Call], answered: list[str | None]) -> _Call:
    """The call that a result belongs to."""
    place, call_id = f"turn {turn + 1} is the result of a tool", result.get("tool_call_id")
    ids = [call.call_id for call in waiting if call.call_id]
    if call_id in ids:
        return next(call for call in waiting if call.call_id == call_id)
    if call_id in answered and call_id:
        raise BadRow(f"{place}, the second one of the call {call_id!r}; keep one of them")
    if call_id and ids:
        raise BadRow(
            f"{place} with the 'tool_call_id' {call_id!r}, which no earlier call without a result has; "
            f"theirs are {', '.join(map(repr, ids))}"
        )
    if not waiting:
        raise BadRow(f"{place}, and there is no earlier call without a result; remove it, or add its call")
    return next((call for call in waiting if call.name == result.get("name")), waiting[0])


def _in_order(answered: list[tuple[_Call, Message]], waiting: list[_Call]) -> list[Message]:
    """Results in the order of their calls."""
    answered = sorted(answered, key=lambda pair: pair[0][:2])
    for call in waiting:
        if any(call.turn == other.turn and call.index < other.index for other, _ in answered):
            raise BadRow(
                f"turn {call.turn + 1} has no result of its call {call.index + 1}, although a later call of it has "
                "one; add that result"
            )
    return [result for _, result in answered]


def check_called_functions(messages: list[Message], tools: list[dict] | None, first: int = 0) -> None:
    """Raises a `BadRow` for a trained call of a function that is not among the tools of its row, if it has any.

    Args:
        messages: turns of one conversation.
        tools: descriptions of tools.
        first: the number of turns before `messages`.
    """
    if not tools:
        return
    # a built-in tool has a type in place of a function
    names = [(tool.get("function") or {}).get("name") or tool.get("name") or tool.get("type") for tool in tools]
    for turn, message in enumerate(messages, first + 1):
        for call in message.get("tool_calls") or [] if is_trained_answer(message) else []:
            name = _read_call(turn, 0, call).name
            if name is not None and name not in names:
                raise BadRow(
                    f"turn {turn} calls the function {name!r}, which is not among its 'tools'."
                    f"{nearest(name, [each for each in names if each])} The tools are {', '.join(map(repr, names))}"
                )
