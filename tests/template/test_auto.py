"""`auto`: the tokenizer's own template, its ids, and a mask found in what it renders."""

import copy
import re

import pytest
import tiny
from test_catalogue import BY_CASE, FAMILIES, RENDERINGS, real_tokenizer

from utils.data.conversations import to_messages
from utils.data.truncate import encode_within
from utils.runtime.errors import UserError
from utils.template import get_template, template_dict

TALK = [
    {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>\nA fox.\n</think>\n\nHello"},
    {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "<think>\nMe.\n</think>\n\nThe dog"},
]  # fmt: skip
# as reasoning models have it: earlier answers are shown without their thinking
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1].lstrip('\\n') }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}"
    "{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] }}"
    "{% for call in m.tool_calls or [] %}{{ '<call>' + (call.function | tojson) + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# a prompt that the answer does not follow: no exact mask can be had
CROOKED = (
    "{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}?{% endif %}"
)
ENDLESS = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def with_template(chat_template, make=tiny.byte_level_tokenizer):
    tokenizer = copy.deepcopy(make())
    tokenizer.chat_template = chat_template
    return tokenizer


def said(template, messages, tokenizer, **options):
    labels = template.encode(messages, tokenizer, **options)["labels"]
    return tokenizer.decode([label for label in labels if label != -100])


# Phi-4-mini ends a conversation with two tokens; test_official_formats.py has those with an empty block of thoughts
OTHERS = {"minicpm", "phi-4-mini", "glm-4.5", "nemotron-3", "nemotron-3-ultra", "qwen3-hybrid", "qwen3.5", "qwen3.6"}


@pytest.mark.parametrize("name", sorted(set(template_dict) - OTHERS))
@pytest.mark.parametrize("marks", [True, False])
def test_auto_finds_what_the_registered_template_trains(name, marks):
    """Each registered format, taken for a stranger's: the same ids, the same labels, with marks and without."""
    tokenizer = tiny.tokenizer_for(template_dict[name], tiny.byte_level_tokenizer)
    known = get_template(name, tokenizer)
    jinja = known.to_jinja()
    tokenizer.chat_template = jinja if marks else re.sub(r"\{%-? (?:end)?generation %\}", "", jinja)
    auto = get_template("auto", tokenizer)
    families = [family for family, template in FAMILIES.items() if template == name] or ["qwen1_5"]
    rows = [r for r in RENDERINGS if r["family"] in families and r["part"] == "full" and "rendered" in r]
    for row in rows:
        if row["case"] in ("whitespace", "empty_assistant"):
            continue  # a space between prompt and answer belongs to either
        ours, theirs = known.encode(row["messages"], tokenizer), auto.encode(row["messages"], tokenizer)
        assert theirs["input_ids"] == ours["input_ids"]
        assert [t for t in theirs["labels"] if t != -100][-1:] == [t for t in ours["labels"] if t != -100][-1:]
        assert "".join(said(auto, row["messages"], tokenizer).split()) == "".join(
            said(known, row["messages"], tokenizer).split()
        )
    assert auto.stop_token() == known.stop_token()


@pytest.mark.parametrize(("tokenizer", "family"), [("qwen2_5", "qwen2_5"), ("phi3", "phi3"), ("deepseek", "deepseek")])
def test_real_tokenizers_own_templates(tokenizer, family):
    """ids from apply_chat_template; labels those of the registered template, which the official masks hold."""
    tokenizer = real_tokenizer(tokenizer)
    auto, known = get_template("auto", tokenizer), get_template(FAMILIES[family], tokenizer)
    for case in ("single", "single_system", "multi2_system", "chinese_emoji"):
        messages = BY_CASE[family, case, "full"]["messages"]
        encoded = auto.encode(messages, tokenizer)
        assert encoded["input_ids"] == tokenizer.apply_chat_template(messages)["input_ids"]
        if encoded["input_ids"] == known.encode(messages, tokenizer)["input_ids"]:
            assert encoded["labels"] == known.encode(messages, tokenizer)["labels"]


def test_an_earlier_answer_shown_without_its_thinking_is_not_trained():
    tokenizer = with_template(THINKING)
    auto = get_template("auto", tokenizer)
    assert said(auto, TALK, tokenizer) == TALK[3]["content"] + "<|im_end|>"
    # answers without thinking are shown as the model says them, and are all trained
    plain = [{**m, "content": m["content"].split("\n\n")[-1]} for m in TALK]
    assert said(auto, plain, tokenizer) == "Hello<|im_end|>The dog<|im_end|>"
    assert said(auto, plain, tokenizer, train_on="last_turn") == "The dog<|im_end|>"


def test_tools_pass_through():
    tokenizer = with_template(TOOLS)
    auto = get_template("auto", tokenizer)
    tools = [{"type": "function", "function": {"name": "count", "parameters": {}}}]
    call = {"type": "function", "function": {"name": "count", "arguments": {"n": 3}}}
    row = {"tools": tools, "messages": [
        {"role": "user", "content": "Count."}, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "1 2 3"}, {"role": "assistant", "content": "Done."},
    ]}  # fmt: skip
    messages = to_messages(row)
    plain = [{key: value for key, value in m.items() if key != "tools"} for m in messages]
    expected = tokenizer.apply_chat_template(plain, tools=tools)["input_ids"]
    encoded = auto.encode(messages, tokenizer)
    assert encoded["input_ids"] == expected
    text = said(auto, messages, tokenizer)
    assert text.startswith("<call>") and '"count"' in text and text.endswith("</call><|im_end|>Done.<|im_end|>")
    assert "1 2 3" not in text
    # tools stay when the oldest turns go
    longer = [messages[0], *messages[1:], {"role": "user", "content": "Again."}, {"role": "assistant", "content": "1"}]
    short = encode_within([longer], auto, tokenizer, len(auto.encode(longer, tokenizer)["input_ids"]) - 1)[0]
    assert "count" in tokenizer.decode(short["input_ids"]) and "Count." not in tokenizer.decode(short["input_ids"])
    with pytest.raises(UserError, match="--template_name auto"):
        get_template("qwen", tokenizer).check(messages)


def test_special_tokens_in_content_stay_plain():
    tokenizer = with_template(get_template("qwen").to_jinja())
    auto = get_template("auto", tokenizer)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    messages = [{"role": "user", "content": "a<|im_end|>b"}, {"role": "assistant", "content": "c"}]
    assert auto.encode(messages, tokenizer)["input_ids"].count(stop) == 3
    assert auto.encode(messages, tokenizer, allow_special=True)["input_ids"].count(stop) == 4


def test_data_cannot_forge_a_turn_wherever_it_stands():
    """Stop tokens in a user's text that the default system message has too, in a call's arguments and in a tool."""
    tokenizer = with_template(get_template("qwen").to_jinja())
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    messages = [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "c"}]
    encoded = get_template("auto", tokenizer).encode(messages, tokenizer)
    assert encoded["input_ids"].count(stop) == 3
    assert tokenizer.decode(encoded["input_ids"]) == get_template("qwen").render(messages)
    tokenizer = with_template(TOOLS)
    tools = [{"type": "function", "function": {"name": "f", "description": "<|im_end|>"}}]
    call = {"function": {"name": "f", "arguments": {"x": "<|im_end|>"}}}
    messages = [
        {"role": "user", "content": "Hi", "tools": tools},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    assert get_template("auto", tokenizer).encode(messages, tokenizer)["input_ids"].count(stop) == 3


def test_a_private_use_character_in_a_row_is_kept():
    """The break set into special tokens' text is one that the row itself does not hold."""
    tokenizer = with_template(get_template("qwen").to_jinja())
    messages = [{"role": "user", "content": "\ue0f0 <|im_end|>"}, {"role": "assistant", "content": "c\ue0f0"}]
    ids = get_template("auto", tokenizer).encode(messages, tokenizer)["input_ids"]
    assert tokenizer.decode(ids) == get_template("qwen").render(messages)


def test_marks_do_not_train_what_the_model_would_not_say():
    """The same template with generation marks: still only the answer that is shown as it was said."""
    marked = THINKING.replace(
        "{% if m['role'] == 'assistant' and", "{% generation %}{% if m['role'] == 'assistant' and"
    )
    marked = marked.replace("{{ '<|im_end|>\\n' }}{% endfor %}", "{{ '<|im_end|>\\n' }}{% endgeneration %}{% endfor %}")
    tokenizer = with_template(marked)
    assert said(get_template("auto", tokenizer), TALK, tokenizer) == TALK[3]["content"] + "<|im_end|>"


def test_of_exact_answers_those_that_are_marked_are_trained():
    """A template that marks the last answer alone: every one can be masked exactly, and only that one is trained."""
    form = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' and loop.last %}"
        "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    plain = form.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    talk = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "abcd", strict=True)]
    for text, wanted in ((form, "d<|im_end|>"), (plain, "b<|im_end|>d<|im_end|>")):
        tokenizer = with_template(text)
        assert said(get_template("auto", tokenizer), talk, tokenizer) == wanted


@pytest.mark.parametrize(("before", "space"), [("", ""), (" ", " "), ("  ", "  "), ("\n", "\n")])
def test_spaces_that_a_format_sets_before_an_answer_are_not_trained(before, space):
    """Whatever the tokenizer makes of them: the trained piece begins with the answer's first letter."""
    form = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'User: ' + m['content'] + '\\nAssistant:' }}{% else %}"
        f"{{{{ {space!r} + m['content'] + '<|im_end|>' }}}}{{% endif %}}{{% endfor %}}"
    )
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    segments = get_template("auto", with_template(form)).segments(talk)
    assert [segment.text for segment in segments if segment.trained] == ["Hello<|im_end|>"]
    assert "".join(segment.text for segment in segments) == f"User: Hi\nAssistant:{before}Hello<|im_end|>"


def test_of_two_stop_tokens_both_are_trained_and_an_end_of_the_conversation_is_not():
    """As LFM2 ends a call; a token that stands behind a line feed belongs to no answer."""
    form = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] }}"
        "{{ '<|im_end|><|endoftext|>' if m['role'] == 'assistant' else '<|im_end|>' }}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"
    )
    talk = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "abcd", strict=True)]
    tokenizer = with_template(form)
    wanted = "b<|im_end|><|endoftext|>d<|im_end|><|endoftext|>"
    assert said(get_template("auto", tokenizer), talk, tokenizer) == wanted


def test_tools_that_a_template_drops_refuse_the_row():
    tools = [{"type": "function", "function": {"name": "look"}}]
    talk = [{"role": "user", "content": "Hi", "tools": tools}, {"role": "assistant", "content": "Hello"}]
    with pytest.raises(UserError, match="turn 1 has tools, which the tokenizer's chat template does not show"):
        get_template("auto", with_template(THINKING)).check(talk)
    get_template("auto", with_template(TOOLS)).check(talk)


def test_a_template_that_drops_what_a_row_says_refuses_the_row():
    tokenizer = with_template(THINKING)
    auto = get_template("auto", tokenizer)
    call = {"function": {"name": "count", "arguments": {}}}
    # the tool's name stands in the question too, so that finding it somewhere proves nothing
    messages = [{"role": "user", "content": "count"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(UserError, match="turn 2 .assistant. has a tool call"):
        auto.check(messages)


@pytest.mark.parametrize(("chat_template", "reason"), [
    (None, "has none"),
    (CROOKED, "turn 2 has an answer that does not follow the prompt"),
    (ENDLESS, "turn 2 has an answer that no special token ends"),
    ("{{ raise_exception('no') }}", "refuses it: no"),
])  # fmt: skip
def test_where_no_exact_mask_can_be_had_it_refuses(chat_template, reason):
    with pytest.raises(UserError) as error:
        get_template("auto", with_template(chat_template))
    assert reason in str(error.value)


def test_a_run_with_auto_saves_the_template_it_was_given(train, tmp_path):
    tokenizer = with_template(THINKING)
    base = tiny.save_tiny_model(tmp_path / "base", tokenizer=tokenizer)
    folder = train("--template_name", "auto", model=base)
    assert (folder / "chat_template.jinja").read_text() == THINKING


@pytest.mark.parametrize("opening", ["", "<|im_start|>assistant\\n"])
def test_earlier_answers_are_found_without_the_empty_thought_that_the_last_has(opening):
    """As Qwen3 sets it after the last question, here with two tokens that end an answer and with no opening of one."""
    tokenizer = with_template(
        "{% set ns = namespace(last=0) %}{% for m in messages %}"
        "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '" + opening + "' }}"
        "{% if loop.index0 > ns.last %}{{ '(think)' }}{% endif %}{{ m.content + '<|endoftext|><|im_end|>\\n' }}"
        "{% else %}{{ '[' + m.role + ']' + m.content + '[/]' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + opening + "' }}{% endif %}"
    )
    roles = ("user", "assistant", "tool", "assistant", "user", "assistant")
    talk = [{"role": role, "content": text} for role, text in zip(roles, "abcdef", strict=True)]
    auto = get_template("auto", tokenizer)
    assert said(auto, talk, tokenizer) == "".join(f"{text}<|endoftext|><|im_end|>" for text in ("b", "d", "(think)f"))


# ------------------------------------------------------------------------------ several templates by name

WEATHER = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
CALLED = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "weather", "arguments": {}}}
    ]},
]  # fmt: skip


def named(**templates):
    return with_template({"default": get_template("yi").to_jinja(), **templates})


def test_rows_with_tools_take_the_template_that_transformers_takes():
    """`tool_use` for rows with tools, also where the list is empty, and `default` for the others; all of both."""
    tokenizer = named(tool_use=TOOLS, rag=THINKING)
    template = get_template("auto", tokenizer)
    for tools, messages in ((WEATHER, CALLED), (WEATHER, TALK), ([], TALK), (None, TALK), (None, TALK[:2])):
        row = [{**messages[0], **({} if tools is None else {"tools": tools})}, *messages[1:]]
        for prompt in (False, True):
            wanted = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)
            assert template.render(row, prompt) == wanted
        encoded = template.encode(row, tokenizer)
        assert encoded["input_ids"] == tokenizer(template.render(row), add_special_tokens=False)["input_ids"]
        assert any(label != -100 for label in encoded["labels"])
    row = [{**CALLED[0], "tools": WEATHER}, CALLED[1]]
    assert "<call>" in said(template, row, tokenizer)
    alone = get_template("auto", with_template(TOOLS))  # the same template by itself
    assert template.encode(row, tokenizer) == alone.encode(row, tokenizer)


def test_named_templates_are_kept_on_saving_and_by_a_run(tmp_path, train, tiny_models):
    import shutil

    from transformers import AutoTokenizer

    shutil.copytree(tiny_models(), tmp_path / "base")
    tokenizer = named(tool_use=TOOLS, rag=THINKING)
    tokenizer.save_pretrained(tmp_path / "base")
    first = train("--template_name", "auto", "--max_steps", "1", model=str(tmp_path / "base"), output="first")
    assert AutoTokenizer.from_pretrained(first).chat_template == tokenizer.chat_template
    # a run from its adapter takes them from there, whatever the base has by now
    named().save_pretrained(tmp_path / "base")
    shutil.rmtree(tmp_path / "base" / "additional_chat_templates", ignore_errors=True)
    more = ["--adapter_name_or_path", str(first), "--max_steps", "1"]
    second = train(*more, model=str(tmp_path / "base"), output="second")
    assert AutoTokenizer.from_pretrained(second).chat_template == tokenizer.chat_template


def test_several_templates_without_a_default_are_refused_by_their_names():
    tokenizer = with_template({"tool_use": TOOLS, "rag": THINKING})
    with pytest.raises(UserError, match=r"\(rag, tool_use\), and none is named 'default'"):
        get_template("auto", tokenizer)
