"""Modelfiles: Go itself evaluates each template as Ollama does, against `render` and the official renderings."""

import copy
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
from conftest import ROOT
from test_catalogue import DATE, FAMILIES, RENDERINGS

from utils.export import merge
from utils.export.modelfile import has_go_form, leading_bos, modelfile, template_in, write_modelfile
from utils.runtime.errors import UserError
from utils.template import get_template, template_dict
from utils.template.go import _SPACES, literal, quoted, to_go

MAKERS = {"byte-level": tiny.byte_level_tokenizer, "SentencePiece": tiny.sentencepiece_tokenizer}
ODD = [
    "{{ .Content }} {{",
    '"""',
    "a\"b'c`d\\n",
    "你好\u3000",
    " \n\t two \n",
    "</s> <|im_end|> [/INST]",
    "🙂\x0b",
    "{%",
]


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory):
    """Evaluates Go templates: `[{"template", "system", "messages"}]` → `[{"text", "error"}]`."""
    if shutil.which("go") is None:
        pytest.skip("no Go to evaluate the templates with; on Debian: apt-get install golang-go")
    folder = tmp_path_factory.mktemp("go")
    shutil.copy(ROOT / "tests" / "helpers" / "render.go", folder / "main.go")
    caches = {"GOCACHE": str(folder / "cache"), "GOPATH": str(folder / "path"), "GO111MODULE": "auto"}
    environment = os.environ | caches | {"GOFLAGS": "-mod=mod", "GOPROXY": "off", "GOTOOLCHAIN": "local"}
    build = ["go", "build", "-o", "render", "main.go"]
    subprocess.run(build, cwd=folder, env=environment, check=True, capture_output=True)

    def run(cases):
        given = json.dumps(cases).encode()
        done = subprocess.run([folder / "render"], input=given, capture_output=True, check=True)
        return json.loads(done.stdout)

    return run


def read_modelfile(text: str) -> dict:
    """A Modelfile's instructions, read as they are documented: `\"""` holds lines, `"` a line, neither an escape."""
    found = {}
    for name, long, short in re.findall(r'^([A-Z]+) (?:"""(.*?)"""|(.*?))$', text, re.DOTALL | re.MULTILINE):
        found.setdefault(name, []).append(long or short)
    return found


def fitted(name, maker="byte-level", bos=True):
    """A registered template with a tokenizer that has its tokens, and its BOS where there shall be one."""
    tokenizer = tiny.tokenizer_for(template_dict[name], MAKERS[maker])
    own = template_dict[name].bos.removeprefix("{bos}") or "<s>"
    tokenizer.bos_token = own if bos else None
    return get_template(name, tokenizer), tokenizer


def case_of(template, tokenizer, messages):
    parsed = read_modelfile(modelfile(template, tokenizer, None))
    return {"template": parsed["TEMPLATE"][0], "system": parsed.get("SYSTEM", [""])[0], "messages": messages}


def turns(*contents, system=None):
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


# gpt-oss ends an answer with one token and earlier ones with another, and shows the date
NAMES = sorted(name for name, template in template_dict.items() if has_go_form(template))
CONVERSATIONS = [
    turns("Hi"),
    turns("Hi", "Hello!", "Who?"),
    turns("你好\n\n第二行", " 好 ", "And?\n", "Yes.", "  Third "),
    turns("Hi", system="Be brief."),
    turns("Hi", "Hello!", "Who?", "I.", "So?", system=" Two\n\nlines "),
    turns("Hi", system=""),
    turns("", "", ""),
    *(turns(text, text, text, system=text) for text in ODD),
    *(turns(text) for text in ODD),
    [*turns("Hi", "Yo", system="a"), {"role": "system", "content": "late"}, {"role": "user", "content": "x"}],
    turns("Hi", "Yo", system="false"),
    [{"role": "system", "content": "alone"}],
]


@pytest.mark.parametrize("bos", [True, False], ids=["bos", "no bos"])
@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_is_what_render_makes(name, bos, evaluate):
    """Each conversation that ends with a question; the BOS that Ollama sets itself is the one that is left out."""
    template, tokenizer = fitted(name, bos=bos)
    added = leading_bos(template, tokenizer)
    wanted, cases = [], []
    for messages in CONVERSATIONS:
        later_system = any(message["role"] == "system" for message in messages[1:])
        if messages[-1]["role"] == "assistant" or (template.system_at_start and later_system):
            continue
        try:
            wanted.append(template.render(messages, add_generation_prompt=True))
        except UserError:
            continue
        cases.append(case_of(template, tokenizer, messages))
    answers = evaluate(cases)
    assert len(answers) >= 8
    for case, answer, text in zip(cases, answers, wanted, strict=True):
        assert (added + answer["text"], answer["error"]) == (text, ""), case["messages"]
    # without the SYSTEM line a template says its default by itself
    assert [answer["text"] for answer in evaluate([case | {"system": ""} for case in cases])] == [
        answer["text"] for answer in answers
    ]


@pytest.mark.parametrize("name", sorted(set(FAMILIES.values()) & set(NAMES)))
def test_a_prompt_is_the_official_one(name, evaluate):
    rows = [row for row in RENDERINGS if FAMILIES[row["family"]] == name and row["part"] == "prompt"]
    rows = [row for row in rows if "rendered" in row and row["messages"][-1]["role"] != "assistant"]
    template = get_template(name, date=DATE)
    rendered = evaluate([{"template": to_go(template), "messages": row["messages"]} for row in rows])
    assert rows
    assert [answer["text"] for answer in rendered] == [row["rendered"] for row in rows]


@pytest.mark.parametrize(("name", "role", "said"), [
    ("llama3.1", "system", "the format llama3.1 has a system message at the start only"),
    ("deepseek-v3", "system", "the format deepseek-v3 has a system message at the start only"),
    *((name, "tool", f"the format {name} has no turn for this role in a Modelfile") for name in NAMES),
])  # fmt: skip
def test_a_turn_that_has_no_place_is_refused_in_words(name, role, said, evaluate):
    template, tokenizer = fitted(name)
    (answer,) = evaluate([case_of(template, tokenizer, [*turns("Hi", "Yo"), {"role": role, "content": "x"}])])
    assert said in answer["error"]


def test_gpt_oss_has_no_go_form():
    without = {name for name, template in template_dict.items() if not has_go_form(template)}
    assert {"gpt-oss", "qwen3-hybrid", "mistral-v3"} <= without
    assert not {"qwen3", "gemma-3", "llama3.2", "mistral-v7-tekken", "phi-4"} & without
    template, tokenizer = fitted("gpt-oss")
    tokenizer.chat_template = template.to_jinja()
    parts = SimpleNamespace(last=lambda: "")
    for name in ("gpt-oss", "auto", None):
        args = SimpleNamespace(template_name=name, thinking="auto", modelfile=True, model_path="run")
        with pytest.raises(UserError, match="cannot be written in Go's syntax"):
            merge._template(args, tokenizer, parts)
        args.modelfile = False
        assert merge._template(args, tokenizer, parts).name == "gpt-oss"


def test_a_modelfile_says_that_it_has_no_tools():
    assert "# TEMPLATE has no tools" in modelfile(*fitted("qwen2.5"), None)
    assert "tools" not in modelfile(*fitted("yi"), None)


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_that_stands_last_is_gone_on_with(name, evaluate):
    template, tokenizer = fitted(name)
    messages = turns("Hi", "Hello!", "Who?", "I am")
    (answer,) = evaluate([case_of(template, tokenizer, messages)])
    prompt = template.render(messages[:-1], add_generation_prompt=True)
    assert leading_bos(template, tokenizer) + answer["text"] == prompt + template.before_answer + "I am"


@pytest.mark.parametrize("name", NAMES)
def test_a_conversation_cut_at_its_front_is_rendered(name, evaluate):
    """What does not fit is cut turn by turn, so that an answer may come first, or after the system message."""
    template, tokenizer = fitted(name)
    cut = [{"role": "assistant", "content": "one"}, {"role": "user", "content": "two"}]
    (answer,) = evaluate([case_of(template, tokenizer, cut)])
    assert not answer["error"] and answer["text"].index("one") < answer["text"].index("two")
    if template.system is None and template.system_with_user is None:
        return
    (answer,) = evaluate([case_of(template, tokenizer, [{"role": "system", "content": "three"}, *cut])])
    assert not answer["error"] and answer["text"].count("three") == 1


@pytest.mark.parametrize(
    "name", [name for name, t in template_dict.items() if t.system is None and t.system_with_user is None]
)
def test_a_system_message_that_has_no_place_is_refused_in_words(name, evaluate):
    template, tokenizer = fitted(name)
    (answer,) = evaluate([case_of(template, tokenizer, turns("Hi", system="Be brief."))])
    assert f"the format {name} has no system message" in answer["error"]


@pytest.mark.parametrize("name", sorted(template_dict))
@pytest.mark.parametrize("maker", sorted(MAKERS))
def test_the_saved_chat_template_is_recognised(name, maker):
    template, tokenizer = fitted(name, maker)
    tokenizer.chat_template = template.to_jinja()
    assert template_in(tokenizer, name).name == name
    found = template_in(tokenizer)  # two formats may be the same but for their models
    assert found.render(turns("Hi"), True) == template.render(turns("Hi"), True)


def test_another_chat_template_is_not_taken_for_a_registered_one():
    template, tokenizer = fitted("qwen")
    assert template_in(tokenizer) is None
    tokenizer.chat_template = template.to_jinja().replace("<|im_end|>", "<|im_end|> ")
    assert template_in(tokenizer, "qwen").name == "auto"
    tokenizer.chat_template = "{% if %}"
    assert template_in(tokenizer) is None


@pytest.mark.parametrize(("name", "stops", "system"), [
    ("qwen", ["<|im_end|>", "<|endoftext|>"], ["You are a helpful assistant"]),
    ("gemma", ["<end_of_turn>", "<|endoftext|>"], []),
    ("minicpm", ["</s>", "<|endoftext|>"], []),
])  # fmt: skip
def test_the_instructions_of_a_modelfile(name, stops, system):
    template, tokenizer = fitted(name)
    ids = [tokenizer.convert_tokens_to_ids(template.stop_token()), 0]
    parsed = read_modelfile(modelfile(template, tokenizer, ids))
    assert parsed["FROM"] == ["."]
    assert parsed["PARAMETER"] == [f'stop "{stop}"' for stop in stops]
    assert parsed.get("SYSTEM", []) == system
    # without a generation_config.json the format's own stop remains
    assert read_modelfile(modelfile(template, tokenizer, None))["PARAMETER"] == [f'stop "{stops[0]}"']


@pytest.mark.parametrize(
    ("name", "bos", "told", "written"),
    # Llama-2 begins each turn with one: in the text for those after the first, with a system message and without
    [("gemma", True, True, 0), ("gemma", False, False, 1), ("llama2", True, True, 2), ("qwen", True, False, 0)],
)
def test_the_converters_are_told_of_the_bos_and_the_tokenizer_stays_as_it_is(name, bos, told, written, tmp_path):
    from transformers import AutoTokenizer

    template, tokenizer = fitted(name, bos=bos)
    tokenizer.save_pretrained(tmp_path)
    before = AutoTokenizer.from_pretrained(tmp_path)
    write_modelfile(tmp_path, template, tokenizer, 0)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["add_bos_token"] is told
    after = AutoTokenizer.from_pretrained(tmp_path)
    text = "Hi 你好<|im_end|>"
    assert before(text, return_offsets_mapping=True).data == after(text, return_offsets_mapping=True).data
    text = read_modelfile((tmp_path / "Modelfile").read_text(encoding="utf-8"))["TEMPLATE"][0]
    assert text.count(template.bos or "<s>") == written


@pytest.mark.parametrize("text", [*ODD, "{", "<|im_start|>system\n", "\r\n", '"', "}}-"])
def test_any_text_can_stand_in_a_format(text, evaluate):
    """Syntax of Go, of the Modelfile, and what Ollama's reader drops since it is not printed."""
    assert evaluate([{"template": f"a{literal(text)}b{{{{ {quoted(text)} }}}}c", "messages": []}]) == [
        {"text": f"a{text}b{text}c", "error": ""}
    ]
    assert '"""' not in literal(text) + quoted(text)
    assert all(char.isprintable() or char == "\n" for char in literal(text) + quoted(text))
    template, tokenizer = fitted("qwen")
    template = replace(template, default_system=text, user="U" + text + "{content}" + text)
    (answer,) = evaluate([case_of(template, tokenizer, turns("Hi"))])
    assert answer["text"] == template.render(turns("Hi"), add_generation_prompt=True)


def test_spaces_are_those_that_python_strips():
    by_size = {}
    for number in range(0x110000):
        if chr(number).isspace():
            by_size.setdefault(len(chr(number).encode()), []).append(chr(number))
    assert {size: sorted(chars) for size, chars in _SPACES.items()} == by_size


def test_a_tokenizer_without_the_templates_stop_is_no_candidate():
    """Looking through the registry neither fails nor changes the tokenizer."""
    tokenizer = copy.deepcopy(tiny.sentencepiece_tokenizer())
    tokenizer.chat_template = get_template("mistral").to_jinja()
    before = (tokenizer.chat_template, tokenizer.eos_token, len(tokenizer))
    assert template_in(tokenizer).name == "mistral"
    assert (tokenizer.chat_template, tokenizer.eos_token, len(tokenizer)) == before


# as SmolLM2's: the BOS token opens every turn, and the system message of a conversation without one is its own
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a small model<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# as Llama-3.1's without tools: a BOS before all, contents trimmed
HEADERS = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set start = 1 %}{% set text = messages[0]['content'] | "
    "trim %}{% else %}{% set start = 0 %}{% set text = '' %}{% endif %}<|start|>system<|sep|>\n\nToday is Monday\n"
    "{{ text }}<|im_end|>{% for m in messages[start:] %}<|start|>{{ m['role'] }}<|sep|>\n\n"
    "{{ m['content'] | trim }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|sep|>\n\n"
    "{% endif %}"
)
OWN = {"smollm2": (SMOLLM2, "<|im_start|>", False), "headers": (HEADERS, "<s>", True)}


def own_format(name):
    chat_template, bos, _ = OWN[name]
    tokenizer = copy.deepcopy(tiny.byte_level_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s>", "<|start|>", "<|sep|>", "<|im_start|>"]})
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template = bos, "<|im_end|>", chat_template
    return tokenizer


@pytest.mark.parametrize("name", OWN)
def test_a_format_of_the_tokenizers_own_is_read_from_its_renderings(name, evaluate, tmp_path):
    """Go's rendering, with the BOS that Ollama adds where it is told so, is that of `apply_chat_template`."""
    tokenizer = own_format(name)
    template = template_in(tokenizer, "auto")
    assert template.name == "auto"
    tokenizer.save_pretrained(tmp_path)
    write_modelfile(tmp_path, template, tokenizer, None)
    told = json.loads((tmp_path / "tokenizer_config.json").read_text())["add_bos_token"]
    assert told is OWN[name][2]
    added = tokenizer.bos_token if told else ""
    asked = [messages for messages in CONVERSATIONS if messages[-1]["role"] == "user"]
    asked = [messages for messages in asked if not any(m["role"] == "system" for m in messages[1:])]
    for messages, answer in zip(asked, evaluate([case_of(template, tokenizer, m) for m in asked]), strict=True):
        wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert (added + answer["text"], answer["error"]) == (wanted, ""), messages
    assert len(asked) > 20


@pytest.mark.parametrize("old, new", [
    ("+ message['content'] +", "+ message['content'].split('</think>')[-1] +"),
    ("<|im_start|>system\n", "<|im_start|>system\n{{ strftime_now('%Y') }}"),
    ("{{ '<|im_start|>' + message['role'] + '\n'", "{{ message['role'] + ': '"),
    ("{% for", "{% if messages | length > 2 %}Long.{% endif %}{% for"),
], ids=["thinking", "date", "no token before a turn", "by length"])  # fmt: skip
def test_a_format_that_pieces_cannot_hold_is_none(old, new):
    tokenizer = own_format("smollm2")
    assert old in SMOLLM2
    tokenizer.chat_template = SMOLLM2.replace(old, new)
    assert template_in(tokenizer) is None


def test_a_registered_format_whose_bos_opens_the_turns_keeps_it_in_its_text(evaluate, tmp_path):
    """ChatML on SmolLM2's tokenizer: with a system message first it would be left out twice, or not at all."""
    template, tokenizer = fitted("qwen2.5")
    tokenizer.bos_token = "<|im_start|>"
    assert leading_bos(template, tokenizer) == ""
    for messages in (turns("Hi"), turns("Hi", system="Be brief.")):
        (answer,) = evaluate([case_of(template, tokenizer, messages)])
        assert answer["text"] == template.render(messages, add_generation_prompt=True)
