"""What a `Template` renders, labels and refuses."""

import pytest
import tiny
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from utils.data.conversations import to_messages
from utils.runtime.errors import UserError
from utils.template import get_template, template_dict

MAKERS = {"byte-level": tiny.byte_level_tokenizer, "SentencePiece": tiny.sentencepiece_tokenizer}


@pytest.mark.parametrize("name", sorted(name for name in template_dict if not template_dict[name].before_answer))
def test_trained_is_the_answer_and_its_stop_token_to_the_last_space(name):
    """No line feed after it, which the property above cannot see: it compares what is said without spaces."""
    tokenizer = tiny.tokenizer_for(template_dict[name], tiny.byte_level_tokenizer)
    template = get_template(name, tokenizer)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The fox."}] * 2
    labels = template.encode(messages, tokenizer)["labels"]
    said = tokenizer.decode([label for label in labels if label != -100])
    once = "The fox." + template.after_answer + template.stop
    assert said == once * 2 + template.closing and template.stop_token()


@pytest.mark.parametrize("maker", sorted(MAKERS))
def test_a_batch_is_encoded_as_its_rows_are(maker):
    tokenizer = tiny.tokenizer_for(template_dict["qwen"], MAKERS[maker])
    template = get_template("qwen", tokenizer)
    rows = [to_messages(row) for row in tiny.ROWS]
    rows.append([{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "x"}])
    assert template.encode_batch(rows, tokenizer) == [template.encode(row, tokenizer) for row in rows]


@pytest.mark.parametrize(("key", "turn"), [("tools", 0), ("tool_calls", 1)])
def test_a_registered_template_has_no_form_for_tools(key, turn):
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
    messages[turn] = {**messages[turn], key: [{"name": "look"}]}
    with pytest.raises(UserError, match=f"turn {turn + 1} has tools, which template 'qwen' does not support"):
        get_template("qwen").render(messages)


USER, ANSWER, SYSTEM = ({"role": role, "content": "x"} for role in ("user", "assistant", "system"))


@pytest.mark.parametrize(("name", "messages", "said"), [
    ("qwen", [], "empty"),
    ("qwen", [{"role": "robot", "content": "Hi"}], "turn 1 has the role 'robot'"),
    ("qwen", [{"role": "user", "content": None}], "turn 1 (user)"),
    ("gemma", [SYSTEM, USER, ANSWER], "turn 1 is a system message, which template 'gemma' does not support; put"),
    ("gemma", [USER, USER], "turn 2 is user where template 'gemma' needs assistant"),
    ("mistral", [ANSWER], "turn 1 is assistant"),
    ("llama2", [USER, ANSWER, SYSTEM, USER], "only at the start"),
    ("llama2", [SYSTEM, ANSWER], "only at the start"),
])  # fmt: skip
def test_what_a_template_cannot_hold(name, messages, said):
    with pytest.raises(UserError) as error:
        get_template(name).render(messages)
    assert said in str(error.value)
    if messages and messages[0]["content"] is not None:
        with pytest.raises(TemplateError):
            render_jinja_template([messages], chat_template=get_template(name).to_jinja())


def test_braces_in_a_system_message_stay_what_they_are():
    messages = [{"role": "system", "content": "Use {content}."}, {"role": "user", "content": "Hi"}]
    template = get_template("llama2")
    assert "Use {content}.\n" in template.render(messages)
    assert render_jinja_template([messages], chat_template=template.to_jinja())[0][0] == template.render(messages)


def test_special_tokens_of_a_template(tokenizer):
    assert get_template("qwen", tokenizer).special_tokens(tokenizer) == ["<|im_end|>", "<|im_start|>"]
    assert get_template("default", tokenizer).special_tokens(tokenizer) == ["<|endoftext|>"]
