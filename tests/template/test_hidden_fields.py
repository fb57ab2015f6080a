"""Which texts of a conversation a rendering leaves out."""

from utils.template.hidden_fields import hidden_fields, remove_fields

USER = {"role": "user", "content": "Hi"}


def contents(messages):
    """Renders contents alone, of answers what follows `</think>`."""
    return "|".join(message["content"].split("</think>")[-1] for message in messages)


def test_what_is_rendered_is_not_hidden():
    messages = [USER, {"role": "assistant", "content": "Hello"}]
    assert hidden_fields(messages, contents, contents(messages)) == []


def test_reasoning_names_and_further_fields_that_are_left_out_are_found():
    answer = {"role": "assistant", "content": "<think>Why?</think>Hello", "reasoning_content": "So."}
    messages = [{**USER, "name": "Ann", "extra": {"mood": "good", "score": 3, "id": "7"}}, answer]
    found = hidden_fields(messages, contents, contents(messages))
    assert sorted(found) == [(0, "mood"), (0, "name"), (0, "score"), (1, "<think>"), (1, "reasoning_content")]
    kept = remove_fields(messages, found)
    assert kept[1] == {"role": "assistant", "content": "Hello", "extra": {}} and contents(kept) == contents(messages)


def test_a_text_that_only_decides_is_not_hidden():
    """No character of it comes out, and yet the rendering depends on it."""

    def loud(messages):
        return contents(messages).upper() if messages[0].get("name") == "Ann" else contents(messages)

    messages = [{**USER, "name": "Ann"}, {"role": "assistant", "content": "Hello"}]
    assert hidden_fields(messages, loud, loud(messages)) == []
