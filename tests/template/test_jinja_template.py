"""Formats with tools: the official rendering, exactly the answers and calls trained, nothing lost, nothing forged."""

import copy
import json
import re
from types import SimpleNamespace

import pytest
import tiny
from conftest import ROOT, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from test_catalogue import DATE, official_rendering
from test_official import RESULT, TOOLS, answer, calls, trained_texts, user
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedConfig
from transformers.utils.chat_template_utils import render_jinja_template

from utils.infer.generate import prompt_ids
from utils.runtime.errors import UserError
from utils.template import get_template, template_dict
from utils.template.dates import fixed_date
from utils.template.format import formats_with_tools
from utils.template.messages import UNREAD_FIELD, UNTRAINED_ANSWER, RowNote
from utils.template.tokenize import special_token_pattern

FAMILIES = {"qwen2.5": "qwen2_5", "qwen3": "qwen3_instruct_2507", "llama3.1": "llama3_1", "deepseek-v3": "deepseekv3",
            "gpt-oss": "gptoss"}  # fmt: skip
# Mistral-7B-Instruct-v0.3's official renderings of CASES; TRL has no copy of its template
MISTRAL = [json.loads(line) for line in (ROOT / "tests/fixtures/mistral_tools.jsonl").read_text("utf-8").splitlines()]
_SPECIAL = re.compile(
    r"<\|[^|<>\s'\"]+\|>|<｜[^｜<>]+｜>|\[/?(?:INST|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]|</?tool_[a-z]+>"
)

LARK, ROOK = {"people": 4, "place": "LARK"}, {"people": 5, "place": "ROOK"}
NESTED = {"who": {"name": "Zoë", "tags": ["猫", None, 1.5, True]}, "note": 'a "b"\n\\c', "none": {}}
SYSTEM = {"role": "system", "content": "SYSTEM."}
SECOND_TOOL = {"type": "function", "function": {
    "name": "天气", "description": "Gives the \"weather\".\nSoon.", "parameters": {"type": "object", "properties": {
        "city": {"type": "string", "enum": ["Oslo", "北京"], "default": "Oslo"},
        "days": {"type": "array", "items": {"type": "integer"}}}}}}  # fmt: skip
KINDS_OF_PARAMETERS = {"type": "function", "function": {
    "name": "kinds", "description": "Has all.", "parameters": {"type": "object", "required": ["a"], "properties": {
        "a": {"type": "array", "nullable": True, "items": {"type": "array", "items": {"type": "boolean"}}},
        "b": {"type": "array"}, "c": {"type": ["string", "null"]}, "d": {"type": "strange"}, "e": {"type": "object"},
        "f": {"oneOf": [{"type": "string", "description": "One.", "default": "x"}, {"type": "number"}]},
        "g": {"type": "string", "nullable": True}, "h": {"type": "string", "default": 'x "y"'},
        "i": {"type": "object", "required": ["x"], "properties": {
            "x": {"type": "string", "enum": ["u", "v"]}, "y": {"type": "integer"}}},
        "j": {"type": "array", "items": {"type": "object"}},
        "k": {"type": "array", "items": {"type": "object", "properties": {"long" * 9: {"type": "string"}}}},
        "m": {"type": "array", "items": {"type": ["object", "object"]}},
        "l": {"oneOf": [{"type": "string"}], "default": "x"}}}}}  # fmt: skip
NO_PARAMETERS = {"type": "function", "function": {"name": "now", "description": "Tells the time."}}


def call(arguments, name="book_table", call_id="abcdef123"):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(text, call_id="abcdef123"):
    return {"role": "tool", "tool_call_id": call_id, "content": text}


def asked(tools=TOOLS, text="Q-ONE?"):
    return user(text, tools=tools)


CASES = {
    "no call": [asked(), answer("A-ONE."), user("Q-TWO?"), answer("A-TWO.")],
    "no call, system": [{**SYSTEM, "tools": TOOLS}, user("Q-ONE?"), answer("A-ONE.")],
    "several tools": [asked([*TOOLS, SECOND_TOOL, KINDS_OF_PARAMETERS, NO_PARAMETERS]), answer("A-ONE.")],
    "one call": [asked(), answer("", tool_calls=[call(LARK)]), RESULT, answer("A-ONE."), user("Q-TWO?"),
                 answer("A-TWO.")],
    "one call, system": [{**SYSTEM, "tools": TOOLS}, user("Q-ONE?"), answer("", tool_calls=[call(LARK)]), RESULT,
                         answer("A-ONE.")],
    "call last": [asked(), answer("", tool_calls=[call(LARK)])],
    "result last": [asked(), answer("", tool_calls=[call(LARK)]), RESULT],
    "calls without tools": [user("Q-ONE?"), answer("", tool_calls=[call(LARK)]), RESULT, answer("A-ONE.")],
    "several calls": [asked(), answer("", tool_calls=[call(LARK), call(ROOK, call_id="abcdef124")]), RESULT,
                      result("SECOND", "abcdef124"), answer("A-ONE.")],
    "text beside a call": [asked(), answer("A-CALL.", tool_calls=[call(LARK)]), RESULT, answer("A-ONE.")],
    "text beside several calls": [asked(), answer("A-CALL.\n", tool_calls=[call(LARK), call(ROOK)]), RESULT],
    "text beside the last call": [asked(), answer("A-CALL.", tool_calls=[call(LARK)])],
    "one after another": [asked(), answer("", tool_calls=[call(LARK)]), RESULT,
                          answer("", tool_calls=[call(ROOK, "天气", "abcdef124")]), result("SECOND", "abcdef124"),
                          answer("A-ONE.")],
    "two questions": [asked(), answer("", tool_calls=[call(LARK)]), RESULT, answer("A-ONE."), user("Q-TWO?"),
                      answer("", tool_calls=[call(ROOK)]), result("SECOND"), answer("A-TWO.")],
    "nested, not ASCII": [asked(text="Wo? 在哪"), answer("", tool_calls=[call(NESTED)]),
                          result('{"ö": "好", "q": "\\"x\\""}\n'), answer("Ça va. 好")],
    "a later system message": [SYSTEM, user("Q-ONE?"), answer("A-ONE."), {**SYSTEM, "content": "S-TWO."},
                               user("Q-TWO?"), answer("A-TWO.")],
    "no arguments": [asked([NO_PARAMETERS]), answer("", tool_calls=[call({}, "now")]), result("12:00"),
                     answer("Noon.")],
}  # fmt: skip
REASONING = {
    "reasoning": [user("Q-ONE?"), answer("A-ONE.", reasoning_content="T-ONE."), user("Q-TWO?"),
                  answer("A-TWO.", reasoning_content="T-TWO.")],
    "reasoning and a call": [asked(), answer("", reasoning_content="T-ONE.", tool_calls=[call(LARK)]), RESULT,
                             answer("A-ONE.", reasoning_content="T-TWO.")],
    "reasoning and the last call": [asked(), answer("", reasoning_content="T-ONE.", tool_calls=[call(LARK)])],
}  # fmt: skip
# what a format refuses although the official template renders it, since that leaves a part out
REFUSED = {
    "llama3.1": {"several calls", "text beside a call", "text beside several calls", "text beside the last call"},
    "gpt-oss": {"several calls", "text beside several calls", "a later system message"},
}
# what DeepSeek-V3's official template renders without the tokens that open or close calls and results
BROKEN = {"one after another", "two questions"}
DEEPSEEK_TOOLS = """## Tools

### Function

You have the following functions available:

"""


def bare(messages):
    return [{key: value for key, value in message.items() if key != "tools"} for message in messages]


def official(name, messages, prompt=False):
    """The official rendering; DeepSeek-V3's template has its tools in the system message and arguments as text."""
    tools, messages = messages[0].get("tools"), copy.deepcopy(bare(messages))
    if name == "deepseek-v3":
        for message in messages:
            for each in message.get("tool_calls", []):
                each["function"]["arguments"] = json.dumps(each["function"]["arguments"], ensure_ascii=False)
        if tools:
            forms = [(tool["function"]["name"], json.dumps(tool["function"], indent=4, ensure_ascii=False))
                     for tool in tools]  # fmt: skip
            text = DEEPSEEK_TOOLS + "\n\n".join(f"- `{name}`:\n```json\n{form}\n```" for name, form in forms)
            has_system = messages[0]["role"] == "system"
            first = f"{messages[0]['content']}\n\n{text}" if has_system else text
            messages, tools = [{"role": "system", "content": first}, *messages[has_system:]], None
    return official_rendering(FAMILIES[name], messages, prompt, tools)


def tokenizer_for(name):
    """A tokenizer with all special tokens of the format, and its tags as tokens that are not special."""
    tokenizer = copy.deepcopy(tiny.byte_level_tokenizer())
    tokens = sorted(set(_SPECIAL.findall(template_dict[name].to_jinja())) | {"<s>", "</s>"})
    tokenizer.add_tokens([AddedToken(t, special=not t.startswith(("<tool_", "</tool_")), normalized=False)
                          for t in tokens])  # fmt: skip
    return tokenizer


def mistral_rows():
    return [(row["case"], row["add_generation_prompt"], row.get("rendered")) for row in MISTRAL]


def test_the_formats_with_tools():
    assert {*FAMILIES, "mistral", "glm-4.5", "lfm2", "nemotron-3", "qwen3-hybrid"} <= set(formats_with_tools)
    assert {name for name, template in template_dict.items() if template.has_tools} == set(formats_with_tools)


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FAMILIES)
def test_renders_as_the_official_template(name, case, prompt):
    template, messages = get_template(name, date=DATE), CASES[case]
    if case in REFUSED.get(name, ()):
        with pytest.raises(UserError):
            template.check(messages)
    elif name == "deepseek-v3" and case in BROKEN:
        assert official(name, messages, prompt) != template.render(messages, prompt)
    else:
        template.check(messages)
        assert template.render(messages, prompt) == official(name, messages, prompt)


@pytest.mark.parametrize(("case", "prompt", "rendered"), mistral_rows())
def test_renders_as_mistrals_official_template(case, prompt, rendered):
    template, messages = get_template("mistral"), CASES[case]
    if messages[0]["role"] == "system" or "text beside" in case:  # which the official template leaves out
        with pytest.raises(UserError):
            template.check(messages)
    else:
        template.check(messages)
        assert template.render(messages, prompt) == rendered


@pytest.mark.parametrize("case", REASONING)
def test_reasoning_is_shown_where_the_official_template_shows_it(case):
    messages = REASONING[case]
    template = get_template("gpt-oss", date=DATE)
    for prompt in (False, True):
        assert template.render(messages, prompt) == official("gpt-oss", messages, prompt)
    untrained = [note for note in template.notes(messages) if note.kind == UNTRAINED_ANSWER]
    assert len(untrained) == (0 if case == "reasoning and the last call" else 1)


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "llama3.1", "deepseek-v3", "mistral"])
def test_reasoning_beside_a_call_is_refused_where_there_is_no_place_for_it(name):
    messages = [asked(), answer("", reasoning_content="T-ONE.", tool_calls=[call(LARK)])]
    with pytest.raises(UserError, match=f"turn 2 .assistant. has 'reasoning_content', which template '{name}' does"):
        get_template(name).check(messages)


def test_deepseek_opens_and_closes_every_turn_of_calls():
    """The official template forgets after the first call that another turn of calls begins."""
    wanted = (
        "<｜tool▁outputs▁end｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>天气\n"
        '```json\n{"people": 5, "place": "ROOK"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>'
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>SECOND<｜tool▁output▁end｜><｜tool▁outputs▁end｜>A-ONE."
    )
    assert wanted in get_template("deepseek-v3").render(CASES["one after another"])


def test_gpt_oss_names_the_function_of_a_result_by_its_id():
    messages = [asked(), answer("", tool_calls=[call(LARK)]), answer("", tool_calls=[call(ROOK, "look", "x")]),
                result("SECOND", "x"), result("FIRST")]  # fmt: skip
    text = get_template("gpt-oss").render(messages)
    names = re.findall(r"<\|start\|>functions\.(\w+) to=assistant<\|channel\|>commentary<\|message\|>\"(\w+)", text)
    assert names == [("look", "SECOND"), ("book_table", "FIRST")]


# ------------------------------------------------------------------------------ what is trained

CALLED = '{"name": "book_table", "arguments": {"people": 4, "place": "LARK"}'
DEEPSEEK_CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>book_table\n```json\n"
    '{"people": 4, "place": "LARK"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>'
)
GPT_CALL = ' to=functions.book_table<|channel|>commentary json<|message|>{"people": 4, "place": "LARK"}<|call|>'
FINAL = "<|channel|>final<|message|>"
ONE_QUESTION = CASES["one call"][:4]  # mistral has tools before the last question, and trains what follows them
TRAINED = {
    "qwen2.5": [f"<tool_call>\n{CALLED}}}\n</tool_call><|im_end|>", "A-ONE.<|im_end|>", "A-TWO.<|im_end|>"],
    "qwen3": [f"<tool_call>\n{CALLED}}}\n</tool_call><|im_end|>", "A-ONE.<|im_end|>", "A-TWO.<|im_end|>"],
    "llama3.1": [CALLED.replace("arguments", "parameters") + "}<|eot_id|>", "A-ONE.<|eot_id|>", "A-TWO.<|eot_id|>"],
    "mistral": [f'[TOOL_CALLS] [{CALLED}, "id": "abcdef123"}}]</s>', "A-ONE.</s>"],
    "deepseek-v3": [DEEPSEEK_CALL, "A-ONE.<｜end▁of▁sentence｜>", "A-TWO.<｜end▁of▁sentence｜>"],
    "gpt-oss": [GPT_CALL, f"{FINAL}A-ONE.<|end|>", f"{FINAL}A-TWO.<|return|>"],
}


@pytest.mark.parametrize("name", TRAINED)
def test_calls_and_answers_are_trained_with_their_stop_tokens(name):
    tokenizer = tokenizer_for(name)
    template = get_template(name, tokenizer)
    messages = ONE_QUESTION if name == "mistral" else CASES["one call"]
    # a token may join the space before an answer with its first letters
    found = [text.lstrip(" ") for text in trained_texts(template.encode(messages, tokenizer), tokenizer)]
    assert found == [text.lstrip(" ") for text in TRAINED[name]]
    last = template.encode(messages, tokenizer, train_on="last_turn")
    assert [text.lstrip(" ") for text in trained_texts(last, tokenizer)] == TRAINED[name][-1:]
    marked = [{**messages[0]}, {**messages[1], "train": False}, *messages[2:]]
    found = trained_texts(template.encode(marked, tokenizer), tokenizer)
    assert [text.lstrip(" ") for text in found] == TRAINED[name][1:]


@pytest.mark.parametrize("name", formats_with_tools)
def test_a_weight_scales_exactly_its_call(name):
    tokenizer = tokenizer_for(name)
    template = get_template(name, tokenizer)
    messages = ONE_QUESTION
    only = [message if turn == 1 else {**message, "train": False} for turn, message in enumerate(messages)]
    of_call = [label != -100 for label in template.encode(only, tokenizer)["labels"]]
    weighted = template.encode([messages[0], {**messages[1], "train": 0.5}, *messages[2:]], tokenizer)
    assert weighted["loss_weights"] == [0.5 if call else 1.0 for call in of_call]
    assert weighted["labels"] == template.encode(messages, tokenizer)["labels"]


@pytest.mark.parametrize("name", formats_with_tools)
def test_train_on_prompt_trains_tools_and_results_too(name):
    tokenizer = tokenizer_for(name)
    encoded = get_template(name, tokenizer).encode(ONE_QUESTION, tokenizer, train_on="prompt")
    assert encoded["labels"] == encoded["input_ids"]


def test_what_stands_before_the_tools_of_mistral_is_not_trained():
    """They precede the last question only; a model that is asked the first one has them in view."""
    tokenizer = tokenizer_for("mistral")
    template = get_template("mistral", tokenizer)
    messages = [*CASES["one call"][:4], user("Q-ONE?"), answer("A-TWO.")]  # the first question once more
    assert template.render(messages).count("[AVAILABLE_TOOLS]") == 1
    encoded = template.encode(messages, tokenizer)
    trained = "".join(trained_texts(encoded, tokenizer))
    assert trained.lstrip() == "A-TWO.</s>"
    with pytest.raises(UserError):  # a call that cannot be told from the rest
        template.encode(messages, tokenizer, train_on="prompt")
    untrained = [note.reason for note in template.notes(messages) if note.kind == UNTRAINED_ANSWER]
    assert untrained == ["has an answer before the tools, which the template shows only later in the conversation"] * 2
    without = [{**message, "tools": []} if turn == 0 else message for turn, message in enumerate(CASES["one call"])]
    assert len(trained_texts(template.encode(without, tokenizer), tokenizer)) == 3


FULL_TOOL = {"type": "function", "function": {
    "name": "f", "description": "D.", "strict": True, "return": {"type": "string", "description": "R."},
    "parameters": {"type": "object", "additionalProperties": False, "required": ["n"], "properties": {
        "n": {"type": "integer", "enum": [1, 2], "minimum": 0, "description": "N."},
        "o": {"type": "object", "properties": {"day": {"type": "string", "description": "The day."}}}}}}}  # fmt: skip


@pytest.mark.parametrize("name", formats_with_tools)
def test_what_a_format_does_not_show_of_a_tool_is_noted(name):
    hidden = {"mistral": ["description (within a tool)"], "gpt-oss": [
        f"{key} (within a tool)" for key in ("description", "additionalProperties", "enum", "minimum")]}  # fmt: skip
    notes = get_template(name).notes([asked([FULL_TOOL]), answer("A.")])
    assert notes == [RowNote(UNREAD_FIELD, text) for text in hidden.get(name, [])]
    nullable = {"type": "object", "properties": {"p": {"type": "string", "nullable": True}}}  # gpt-oss: "| null"
    tools = [*TOOLS, {"type": "function", "function": {"name": "f", "parameters": nullable}}]
    assert get_template(name).notes([asked(tools), answer("A.")]) == []


def test_what_a_tokenizers_own_template_does_not_show_of_a_tool_is_noted():
    tokenizer = copy.deepcopy(tiny.byte_level_tokenizer())
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}{% for m in messages %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    notes = get_template("auto", tokenizer).notes([asked(), answer("A.")])
    assert notes == [RowNote(UNREAD_FIELD, f"description ({place} a tool)") for place in ("of", "within")]


@pytest.mark.parametrize("case", [*CASES, *REASONING])
@pytest.mark.parametrize("name", FAMILIES)
def test_trained_is_what_auto_finds_in_the_official_template(name, case):
    """`auto` locates the answers by rendering parts of the conversation, without any marks."""
    messages = {**CASES, **REASONING}[case]
    if case in REFUSED.get(name, ()) or (name == "deepseek-v3" and case in BROKEN):
        return
    if case in REASONING and name != "gpt-oss":
        return
    tokenizer = tokenizer_for(name)
    template = get_template(name, tokenizer, DATE)
    encoded = template.encode(messages, tokenizer)
    assert encoded["input_ids"] == tokenizer(official(name, messages), add_special_tokens=False)["input_ids"]
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = re.sub(r"\{%- (end)?generation %\}", "", template.to_jinja())
    auto = get_template("auto", plain, DATE)
    assert not auto.has_generation_marks()
    assert auto.encode(messages, plain) == encoded
    assert auto.notes(messages) == template.notes(messages)


@pytest.mark.parametrize("case", [*CASES, *REASONING])
@pytest.mark.parametrize("name", formats_with_tools)
def test_the_saved_chat_template_has_the_ids_and_the_mask_of_training(name, case):
    messages = {**CASES, **REASONING}[case]
    tokenizer = tokenizer_for(name)
    template = get_template(name, tokenizer)
    try:
        template.check(messages)
    except UserError:
        return
    tokenizer.chat_template = template.to_jinja()
    options = {"tools": messages[0].get("tools"), "return_dict": True, "return_assistant_tokens_mask": True}
    saved = tokenizer.apply_chat_template(bare(messages), **options)
    encoded = template.encode(messages, tokenizer)
    if template.closing and messages[-1]["role"] == "assistant":  # training adds a token
        encoded = {name: values[:-1] for name, values in encoded.items()}
    assert saved["input_ids"] == encoded["input_ids"]
    if not [note for note in template.notes(messages) if note.kind == UNTRAINED_ANSWER]:
        assert saved["assistant_masks"] == [int(label != -100) for label in encoded["labels"]]


@pytest.mark.parametrize("name", [name for name in formats_with_tools if not template_dict[name].jinja_only])
def test_a_conversation_without_tools_is_the_same_by_both_ways(name):
    template = get_template(name)
    for messages in ([user(" Q? "), answer("\nA. ")], [user("Q?"), answer("A."), user("P?")]):
        for prompt in (False, True):
            assert template.render(messages, prompt) == template._form.render(messages, prompt)


def test_rows_with_and_without_tools_keep_their_order_in_a_batch():
    tokenizer = tokenizer_for("qwen2.5")
    template = get_template("qwen2.5", tokenizer)
    rows = [CASES["one call"], [user("Hi"), answer("Yo")], CASES["no call"], [user("P?"), answer("A.")]]
    assert template.encode_batch(rows, tokenizer) == [template.encode(row, tokenizer) for row in rows]


@pytest.mark.parametrize("name", sorted(set(formats_with_tools) - {"qwen3.5-small"}))  # which does not reason unasked
def test_a_generation_prompt_is_what_stands_before_a_trained_call(name):
    """`infer` and `evaluate` ask with the saved chat template; the answer begins at the first label of training."""
    tokenizer = tokenizer_for(name)
    template = get_template(name, tokenizer)
    tokenizer.chat_template = template.to_jinja()
    messages = CASES["call last"]
    if "T-ONE." in template.render(reasoned := REASONING["reasoning and the last call"]):
        messages = reasoned  # without reasoning, an empty block follows the prompt
    ids = prompt_ids(SimpleNamespace(config=PreTrainedConfig()), tokenizer, bare(messages[:1]), messages[0]["tools"])
    encoded = template.encode(messages, tokenizer)
    start = next(place for place, label in enumerate(encoded["labels"]) if label != -100)
    assert encoded["input_ids"][:start] == ids


def test_a_run_trains_calls_and_saves_their_format(train, tmp_path):
    rows = [{"messages": bare(CASES[case]), "tools": TOOLS} for case in ("one call", "several calls")]
    rows += [{"instruction": "Hi", "output": "Yo"}]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    folder = train("--template_name", "qwen2.5", "--max_steps", "1", data=data)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = get_template("qwen2.5", tokenizer)
    assert tokenizer.chat_template == template.to_jinja()
    for case in ("one call", "several calls"):
        saved = tokenizer.apply_chat_template(bare(CASES[case]), tools=TOOLS)
        assert saved["input_ids"] == template.encode(CASES[case], tokenizer)["input_ids"]
    summary = json.loads((folder / "train_args.json").read_text(encoding="utf-8"))
    assert summary["common"]["template_name"] == "qwen2.5"
    assert "3 rows" in (folder / "train.log").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------ nothing is forged


def conversation(text):
    """A conversation with `text` wherever data with tools may have one."""
    tool = {"type": "function", "function": {"name": "f", "description": text, "parameters": {
        "type": "object", "properties": {"p": {"type": "string", "description": text}}}}}  # fmt: skip
    return [user(f"Q{text}", tools=[tool]), answer("", tool_calls=[call({"p": text, "q": [{"r": text}]}, "f")]),
            result(f"R{text}"), answer("A.")]  # fmt: skip


@pytest.mark.parametrize("name", formats_with_tools)
def test_no_text_of_the_data_becomes_a_token_of_the_format(name):
    tokenizer = tokenizer_for(name)
    template = get_template(name, tokenizer)
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    plain = [token for token in template.encode(conversation("x"), tokenizer)["input_ids"] if token in added]
    tokens = set(special_token_pattern(tokenizer).findall(template.full_text()))
    assert len(tokens) >= 2
    for text in tokens:
        ids = template.encode(conversation(text), tokenizer)["input_ids"]
        assert [token for token in ids if token in added] == plain, text
        assert tokenizer.decode(ids) == template.render(conversation(text)) + template.closing
    allowed = template.encode(conversation(text), tokenizer, allow_special=True)["input_ids"]
    assert len([token for token in allowed if token in added]) > len(plain)


def test_a_result_does_not_close_itself_with_a_tag_of_the_format():
    tokenizer = tokenizer_for("qwen3")
    template = get_template("qwen3", tokenizer)
    counts = [
        template.encode(conversation(text), tokenizer)["input_ids"].count(
            tokenizer.convert_tokens_to_ids("</tool_response>")
        )
        for text in ("x", "</tool_response>")
    ]
    assert counts == [1, 1]


def test_a_row_without_tools_forges_no_tag_of_the_format():
    """As in a prompt of `infer`, which escapes what the whole saved chat template writes."""
    tokenizer = tokenizer_for("qwen3")
    ids = get_template("qwen3", tokenizer).encode([user("</tool_response>"), answer("A.")], tokenizer)["input_ids"]
    assert tokenizer.convert_tokens_to_ids("</tool_response>") not in ids


TEXTS = st.one_of(
    st.text(max_size=12), st.sampled_from(["<|end|>", "<|return|>", "a<|call|>b", " \n", "<|start|>user"])
)


@settings(max_examples=30, deadline=None)
@given(turns=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3))
def test_of_any_conversation_in_gpt_oss_exactly_the_answers_and_stops_are_trained(turns):
    tokenizer = tokenizer_for("gpt-oss")
    template = get_template("gpt-oss", tokenizer)
    messages = [message for question, text in turns for message in (user(question), answer(text))]
    found = trained_texts(template.encode(messages, tokenizer), tokenizer)
    ends = ["<|end|>"] * (len(turns) - 1) + ["<|return|>"]
    assert found == [FINAL + text + end for (_, text), end in zip(turns, ends, strict=True) if text.strip()]


# ------------------------------------------------------------------------------ gpt-oss: tools as TypeScript

KINDS = st.sampled_from(["string", "number", "integer", "boolean", "null", "strange"])
WORDS = st.sampled_from(["a", "b_c", "dé", 'q"'])


def objects(inner):
    properties = st.dictionaries(WORDS, inner, max_size=3)
    return st.fixed_dictionaries(
        {"type": st.just("object")}, optional={"properties": properties, "required": st.lists(WORDS, max_size=2)}
    )


SCHEMAS = st.recursive(
    st.one_of(
        st.fixed_dictionaries({"type": KINDS}, optional={
            "description": WORDS, "nullable": st.booleans(), "enum": st.lists(WORDS, min_size=1, max_size=3),
            "default": WORDS}),
        st.fixed_dictionaries({}, optional={"type": st.lists(KINDS, min_size=1, max_size=3)}),
    ),
    lambda inner: st.one_of(
        st.fixed_dictionaries({"type": st.just("array")}, optional={"items": inner, "nullable": st.booleans()}),
        st.fixed_dictionaries({"oneOf": st.lists(inner, min_size=1, max_size=3)}, optional={"default": WORDS}),
        objects(inner),
    ),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(parameters=objects(SCHEMAS))
def test_any_tool_is_written_as_the_official_gpt_oss_template_does(parameters):
    tool = {"type": "function", "function": {"name": "f", "description": "D.", "parameters": parameters}}
    messages = [asked([tool]), answer("A.")]
    assert get_template("gpt-oss", date=DATE).render(messages) == official("gpt-oss", messages)


# ------------------------------------------------------------------------------ what is refused, and how

MANY = answer("", tool_calls=calls(LARK, ROOK))


@pytest.mark.parametrize(("name", "messages", "said"), [
    ("llama3.1", [asked(), MANY], "turn 2 has 2 tool calls, and this format has one in a turn"),
    ("llama3.1", [{**SYSTEM, "tools": TOOLS}, user("Q?"), MANY], "turn 3 has 2 tool calls"),
    ("llama3.1", [asked(), answer("A.", tool_calls=calls(LARK))], "turn 2 has text beside a tool call"),
    ("llama3.1", [answer("A.", tools=TOOLS), user("Q?"), answer("A.")], "no user comes first"),
    ("gpt-oss", [asked(), MANY], "turn 2 has 2 tool calls, and this format has one in a turn"),
    ("gpt-oss", [asked(), answer("A.", thinking="T.", tool_calls=calls(LARK))], "turn 2 has both text and reasoning"),
    ("gpt-oss", [user("Q?"), answer("", tool_calls=calls(LARK)), result("R", "other")],
     "turn 3 is the result of a tool that no earlier turn calls"),
    ("gpt-oss", [SYSTEM, user("Q?"), SYSTEM, answer("A.")], "turn 3 is a system message"),
    ("mistral", [asked(), answer("", tool_calls=[call(LARK, call_id="call_12345")])],
     'turn 2 has a tool call with the id "call_12345"'),
    ("mistral", [user("Q?"), answer("", tool_calls=calls(LARK)), {"role": "tool", "content": "R"}],
     'turn 3 is the result of a tool with the "tool_call_id" null'),
    ("mistral", [{**SYSTEM, "tools": TOOLS}, user("Q?"), answer("A.")],
     "turn 1 is a system message, for which this format has no place; put its text at the start of the first question"),
    *((name, [asked([*TOOLS, {"type": "web_search"}]), answer("A.")], 'tool 2 has the type "web_search"')
      for name in ("mistral", "deepseek-v3", "gpt-oss")),
    ("mistral", [asked(), user("P?"), answer("A.")], "turn 2: user and assistant must take turns"),
])  # fmt: skip
def test_what_a_format_with_tools_refuses(name, messages, said):
    template = get_template(name)
    with pytest.raises(UserError, match=re.escape(said)) as error:
        template.check(messages)
    assert f"template {name!r}" in str(error.value)
    with pytest.raises(TemplateError, match=re.escape(said)):
        render_jinja_template([bare(messages)], tools=messages[0].get("tools"), chat_template=template.to_jinja())


@pytest.mark.parametrize("name", formats_with_tools)
def test_a_call_of_another_kind_than_a_function_is_refused(name):
    messages = [asked(), answer("", tool_calls=[{"id": "abcdef123", "type": "web_search", "query": "Q"}])]
    with pytest.raises(UserError, match=f"turn 2 has a tool call of the type 'web_search', and template '{name}' has"):
        get_template(name).check(messages)


@pytest.mark.parametrize("messages", [[asked(), answer("A.")], [user("Q?"), {"role": "tool", "content": "R"}]])
def test_a_format_without_tools_names_those_with_tools(messages):
    with pytest.raises(UserError) as error:
        get_template("yi").check(messages)
    assert all(name in str(error.value) for name in ("'yi'", "--template_name auto", *FAMILIES, "mistral"))


# ------------------------------------------------------------------------------ every text of the Jinja files counts


OPTIONS = [
    {},
    {"enable_thinking": False},
    {"enable_thinking": True},
    {"low_effort": True},
    {"medium_effort": True},
    {"closing": "<|user|>"},
]
MORE_CASES = [
    [user("Q?"), answer("A.")], [SYSTEM, user("Q?"), answer("A.")],
    [user("Q?"), answer("A."), user("P?"), answer("B.")],
    [user("Q?"), answer("", tool_calls=[{"function": {"name": "f", "arguments": {}}}])],
    [user("Q?"), answer("<think>\nT.\n</think>\n\nA.")],
    [{**SYSTEM, "content": "S. /no_think"}, user("Q?"), answer("A.")],
    [{**SYSTEM, "content": "S. /system_override"}, user("Q?"), answer("A.")],
    [user("Q?"), answer("<|channel>thought\nT.<channel|>A.")], [SYSTEM, {**SYSTEM, "content": "S2."}, user("Q?")],
    [user("Q?"), answer("", tool_calls=[call({"p": "it's \\ \n\r", "q": [1], "r": True})])],
    [asked(), answer("", tool_calls=calls(LARK)), RESULT, {**SYSTEM, "content": "S2."}],
    [user("<tool_response>x</tool_response>"), user("Q?"), answer("A.")],
    [user("Q?"), answer("<think>\nT."), user("P?"), answer("", tool_calls=calls(LARK))],
    [asked([{**SECOND_TOOL, "function": {**SECOND_TOOL["function"], "strict": True, "limits": [1], "x": "y"}}])],
    [asked([{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "strict": False}}}])],
    [user("Q?"), answer("<think>T.", tool_calls=calls(LARK)), RESULT, user("P?")],
]  # fmt: skip


@pytest.mark.parametrize("jinja", sorted({each.jinja for each in template_dict.values() if "jinja" in vars(each)}),
                         ids=lambda jinja: jinja[4:34].split(":")[0])  # fmt: skip
def test_one_wrong_text_is_noticed(jinja):
    """Each text that a Jinja file prints, changed by one character, differs in the rendering of some case."""
    cases = [*MORE_CASES, *CASES.values(), *REASONING.values()]
    settings = [
        each.to_jinja().removesuffix(jinja) for each in template_dict.values() if vars(each).get("jinja") == jinja
    ]

    def renderings(text):
        for head in settings:
            for messages in cases:
                for options in ({}, {"add_generation_prompt": True}, *OPTIONS[1:]):
                    options = {"add_generation_prompt": bool(options), **options}
                    try:
                        with fixed_date(DATE):
                            yield render_jinja_template(
                                [bare(messages)], tools=messages[0].get("tools"), chat_template=head + text, **options
                            )[0][0]
                    except Exception:
                        yield None

    right = list(renderings(jinja))
    printed = [
        (block.start() + match.start(), match[0])
        for block in re.finditer(r"\{\{-(.*?) \}\}\n", jinja, re.DOTALL)
        if "raise_exception" not in block[1]
        for match in re.finditer(r"(?<![\[(])'(?:\\.|[^'\\])+'", jinja[block.start() : block.end()])
    ]
    assert len(printed) > 3
    unnoticed = []
    for start, text in printed:
        wrong = f"{jinja[:start]}{text[:-1]}!'{jinja[start + len(text) :]}"
        if not any(one != other for one, other in zip(renderings(wrong), right, strict=True)):
            unnoticed.append(text)
    assert unnoticed == []
