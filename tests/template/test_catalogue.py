"""Every template against its official rendering, ids and mask, and against properties that hold for any text."""

import copy
import functools
import json
import os
from dataclasses import fields, replace
from pathlib import Path

import pytest
import tiny
import trl
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from utils.runtime.errors import UserError
from utils.template import get_template, template_dict
from utils.template.dates import fixed_date

FAMILIES = {
    "qwen1_5": "qwen", "qwen2": "qwen2", "qwen2_5": "qwen2.5", "qwen3_instruct_2507": "qwen3", "yi": "yi",
    "gemma": "gemma", "phi3": "phi-3", "deepseek": "deepseek", "mistral_v0_2": "mistral", "minicpm": "minicpm",
    "llama2": "llama2", "llama3": "llama3", "llama3_1": "llama3.1", "deepseekv3": "deepseek-v3", "gptoss": "gpt-oss",
    "llama3_2": "llama3.2", "gemma3": "gemma-3", "gemma4_v5": "gemma-4", "qwen3": "qwen3-hybrid",
    "qwen3_5_think": "qwen3.5", "qwen3_5_nothink": "qwen3.5-small", "qwen3_6": "qwen3.6",
    "deepseek_r1_distill": "deepseek-r1", "glm4moe": "glm-4.5", "lfm2_v2": "lfm2", "lfm2_2_5_v2": "lfm2.5",
    "nemotron_3_nano": "nemotron-3", "nemotron_3_ultra": "nemotron-3-ultra", "cohere2": "cohere2",
    "chatml": "chatml", "smollm2": "smollm2", "smollm3": "smollm3", "internlm2": "internlm2", "phi4": "phi-4",
    "phi4_mini": "phi-4-mini", "mistral_v3": "mistral-v3", "mistral_v3_tekken": "mistral-v3-tekken",
    "mistral_v7_tekken": "mistral-v7-tekken",
}  # fmt: skip
# family of which TRL has the official template → the BOS token
IN_TRL = {
    "llama3_1": "<|begin_of_text|>", "llama3_2": "<|begin_of_text|>", "deepseekv3": "<｜begin▁of▁sentence｜>",
    "gptoss": "", "gemma3": "<bos>", "gemma4_v5": "<bos>", "qwen3": "", "qwen3_5_think": "", "qwen3_5_nothink": "",
    "qwen3_6": "", "deepseek_r1_distill": "<｜begin▁of▁sentence｜>", "glm4moe": "", "lfm2_v2": "<|startoftext|>",
    "lfm2_2_5_v2": "<|startoftext|>", "nemotron_3_nano": "", "nemotron_3_ultra": "", "cohere2": "<BOS_TOKEN>",
}  # fmt: skip
DATE = "2024-07-26"  # of what shows one
FIXTURES = ROOT / "tests" / "fixtures"


def reference(name):
    rows = [json.loads(line) for line in (FIXTURES / name).read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["family"] in FAMILIES]


@functools.cache
def official_template(family):
    """TRL's copy; its DeepSeek-V3 is a revision with reasoning, whose prompt opens a thought."""
    text = (Path(trl.__file__).parent / "chat_templates" / f"{family}.jinja").read_text(encoding="utf-8")
    return text.replace("<think>\\n", "") if family == "deepseekv3" else text


def official_rendering(family, messages, prompt=False, tools=None):
    options = {"add_generation_prompt": prompt, "bos_token": IN_TRL.get(family), "tools": tools}
    with fixed_date(DATE):
        return render_jinja_template([messages], chat_template=official_template(family), **options)[0][0]


def rendered_now(family):
    """Rows as those of the fixtures, of the conversations of Llama-3."""
    for row in reference("chat_renderings.jsonl"):
        if row["family"] == "llama3":
            try:
                text = official_rendering(family, row["messages"], row["add_generation_prompt"])
            except TemplateError:  # it refuses the conversation
                text = None
            yield {**row, "family": family, "rendered": text}


# more_renderings.jsonl: by the official templates that TRL has no copy of
RENDERINGS = reference("chat_renderings.jsonl") + reference("more_renderings.jsonl")
RENDERINGS += [row for family in IN_TRL for row in rendered_now(family)]
BY_CASE = {(row["family"], row["case"], row["part"]): row for row in RENDERINGS}


def name_of(row):
    return f"{row['family']}-{row['case']}-{row['part']}"


@functools.cache
def real_tokenizer(name):
    for folder in (os.environ.get("DOJO_TOKENIZERS"), ROOT.parent / "shared/reference/tokenizers"):
        if folder and (Path(folder) / name).is_dir():
            return AutoTokenizer.from_pretrained(Path(folder) / name)
    pytest.skip(f"no tokenizer {name}; name a folder of real tokenizers in DOJO_TOKENIZERS")


def rendering_of(template, row):
    try:
        return template.render(row["messages"], row["add_generation_prompt"])
    except UserError:
        return None


def jinja_rendering_of(template, row):
    options = {"chat_template": template.to_jinja(), "add_generation_prompt": row["add_generation_prompt"]}
    try:
        with fixed_date(DATE):
            return render_jinja_template([row["messages"]], **options)[0][0]
    except Exception:
        return None


def test_every_template_except_default_has_official_renderings():
    assert set(template_dict) == {*FAMILIES.values(), "default"}
    assert {row["family"] for row in RENDERINGS} == set(FAMILIES)
    for template in template_dict.values():
        assert template.source
        assert template.models


@pytest.mark.parametrize("row", RENDERINGS, ids=name_of)
def test_renders_as_the_official_template(row):
    """Character for character; where the official template refuses, so do we."""
    template = get_template(FAMILIES[row["family"]], date=DATE)
    assert rendering_of(template, row) == row.get("rendered")
    assert jinja_rendering_of(template, row) == row.get("rendered")


@pytest.mark.parametrize("name", sorted(FAMILIES.values()))
def test_one_wrong_character_is_noticed(name):
    """Each text of each template, changed by one character, differs from some official rendering."""
    rows = [row for row in RENDERINGS if FAMILIES[row["family"]] == name]
    template = get_template(name, date=DATE)
    for field in fields(template):
        value = getattr(template, field.name)
        # these fields do not show in the renderings; other tests cover them
        others = ("name", "source", "models", "closing", "alternate", "jinja", "date", "call_stop", "system_at_start")
        others += ("settings", "exact_marks", "jinja_system", "keep_system")
        if field.name in others or value in (None, "", (), False) or template.jinja_only:
            continue
        wrong = not value if isinstance(value, bool) else value + "!"
        mutant = replace(template, **{field.name: wrong})
        # a Jinja text that is not made of these fields is covered by test_jinja_template.py
        for render in (rendering_of, jinja_rendering_of)[: 1 if "jinja" in vars(template) else 2]:
            assert any(render(mutant, row) != row.get("rendered") for row in rows), field.name


@pytest.mark.parametrize("row", [row for row in reference("chat_ids.jsonl") if row["part"] == "full"], ids=name_of)
def test_ids_are_the_official_ones(row):
    tokenizer = real_tokenizer(row["tokenizer"])
    template = get_template(FAMILIES[row["family"]], tokenizer)
    messages = BY_CASE[row["family"], row["case"], "full"]["messages"]
    encoded = template.encode(messages, tokenizer)
    assert encoded["input_ids"] == row["ids"]
    theirs = tokenizer.apply_chat_template(
        messages, chat_template=template.to_jinja(), return_dict=True, return_assistant_tokens_mask=True
    )
    assert theirs["input_ids"] == row["ids"]
    marked = [i for i, mark in enumerate(theirs["assistant_masks"]) if mark]
    if row["case"] == "empty_assistant":  # the model would learn to stop at once
        marked = []
    trained = [i for i, label in enumerate(encoded["labels"]) if label != -100]
    # Phi-3's <|assistant|> swallows the spaces an answer begins with, and so bears the mark; it is not trained
    assert trained == [i for i in marked if tokenizer.convert_ids_to_tokens(row["ids"][i]) != "<|assistant|>"]
    if row["case"] != "whitespace":
        answers = [m["content"] + template.stop for m in messages if m["role"] == "assistant" and m["content"]]
        said = tokenizer.decode([row["ids"][i] for i in trained])
        assert said.replace(" ", "") == "".join(answers).replace(" ", "")


@pytest.mark.parametrize("row", reference("chat_masks.jsonl"), ids=lambda row: f"{row['family']}-{row['case']}")
def test_masks_are_the_official_ones_but_for_line_feeds(row):
    """TRL's training templates also train the line feeds around an answer, and empty answers; nothing else differs."""
    tokenizer = real_tokenizer(row["tokenizer"])
    labels = get_template(FAMILIES[row["family"]], tokenizer).encode(row["messages"], tokenizer)["labels"]
    if row["case"] == "empty_assistant":
        assert set(labels) == {-100}
        return
    for token, theirs, ours in zip(row["ids"], row["assistant_masks"], labels, strict=True):
        if theirs != (ours != -100):
            assert theirs
            assert tokenizer.decode([token]).strip() in ("", "<|assistant|>", "<|endoftext|>")


@pytest.mark.parametrize(
    "row",
    [row for row in reference("chat_ids.jsonl") if row["part"] == "prompt" and "ids" in row],
    ids=name_of,
)
def test_prompts_have_the_official_ids(row):
    """What the model sees when it is asked, by the template that is saved with it."""
    tokenizer = real_tokenizer(row["tokenizer"])
    template = get_template(FAMILIES[row["family"]], tokenizer)
    messages = BY_CASE[row["family"], row["case"], "prompt"]["messages"]
    seen = tokenizer.apply_chat_template(messages, chat_template=template.to_jinja(), add_generation_prompt=True)
    assert seen["input_ids"] == row["ids"]


# ------------------------------------------------------------------------------ any conversation

TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    st.sampled_from(
        ["<|im_end|>", "</s>", "a<|end|>b", "<<|im_end|>>", "<|im_<|im_end|>end|>", " \n", "[/INST]", "<eos>"]
    ),
)
TURNS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3)
MAKERS = {"byte-level": tiny.byte_level_tokenizer, "SentencePiece": tiny.sentencepiece_tokenizer}


@pytest.mark.parametrize("maker", sorted(MAKERS))
# test_official_formats.py has the others
@pytest.mark.parametrize("name", sorted(name for name, each in template_dict.items() if not each.jinja_only))
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(turns=TURNS, system=st.none() | TEXTS)
def test_of_any_conversation_exactly_the_answers_and_stops_are_trained(name, maker, turns, system):
    """Trained is what the answers say and one stop token each; content never becomes a special token."""
    if maker == "SentencePiece" and name.endswith("tekken"):
        return  # a byte-level tokenizer
    tokenizer = tiny.tokenizer_for(template_dict[name], MAKERS[maker])
    template = get_template(name, tokenizer)
    messages = [
        {"role": role, "content": text}
        for pair in turns
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    if system is not None and (template.system or template.system_with_user):
        messages.insert(0, {"role": "system", "content": system})
    encoded = template.encode(messages, tokenizer)
    stop = tokenizer.convert_tokens_to_ids(template.stop_token())
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    trained = [label for label in encoded["labels"] if label != -100]
    said_something = [bool(answer.strip()) for _, answer in turns]  # an empty answer would teach to stop at once
    stops = sum(said_something) if template.stop else said_something[-1]
    assert [token for token in trained if token in special] == [stop] * stops
    # the specials of the whole are those of the same conversation with nothing said
    silent = template.render([{**m, "content": ""} for m in messages]) + template.closing
    expected = [t for t in tokenizer(silent, add_special_tokens=False)["input_ids"] if t in special]
    assert [token for token in encoded["input_ids"] if token in special] == expected
    # one tokenisation of the rendering, where no content has a special token's text
    text = template.render(messages) + template.closing
    if [t for t in tokenizer(text, add_special_tokens=False)["input_ids"] if t in special] == expected:
        assert encoded["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    answers = [template._stripped(m["content"]) for m in messages if m["role"] == "assistant"]
    said = tokenizer.decode([token for token in trained if token not in special])
    assert "".join(said.split()) == "".join("".join(answers).split())


@pytest.mark.parametrize("name", sorted(template_dict))
def test_special_tokens_in_content_when_allowed(name, tokenizer):
    tokenizer = tiny.tokenizer_for(template_dict[name], tiny.byte_level_tokenizer)
    template = get_template(name, tokenizer)
    stop = template.stop_token()
    messages = [{"role": "user", "content": f"a{stop}b"}, {"role": "assistant", "content": "c"}]
    counts = [
        template.encode(messages, tokenizer, allow_special=allowed)["input_ids"].count(
            tokenizer.convert_tokens_to_ids(stop)
        )
        for allowed in (False, True)
    ]
    assert counts[1] == counts[0] + 1


# ------------------------------------------------------------------------------ the rest


def test_default_uses_the_tokenizers_own_tokens(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    messages.append({"role": "assistant", "content": "Yo"})
    text = get_template("default", tokenizer).render(messages)
    assert text == "System: Be brief.\n\nUser: Hi\n\nAssistant:\nYo<|endoftext|>\n\n"
    sentencepiece = tiny.sentencepiece_tokenizer()
    assert get_template("default", sentencepiece).render(messages[1:]) == "<s>User: Hi\n\nAssistant:\nYo</s>\n\n"


def test_an_unknown_name_shows_the_nearest():
    with pytest.raises(UserError) as error:
        get_template("qwenn")
    assert "'qwenn'" in str(error.value)
    assert "Did you mean 'qwen'" in str(error.value)


def test_a_stop_token_the_tokenizer_does_not_have_is_refused():
    tokenizer = copy.deepcopy(tiny.sentencepiece_tokenizer())
    with pytest.raises(UserError) as error:
        get_template("qwen", tokenizer)
    assert "'<|im_end|>'" in str(error.value)
    assert "must be one" in str(error.value)


def test_a_piece_that_only_looks_like_the_stop_token_is_refused(tokenizer):
    """A vocabulary may hold the text of another family's stop token, which the tokenizer never makes of it."""
    other = copy.deepcopy(tokenizer)
    state = json.loads(other.backend_tokenizer.to_str())
    state["model"]["vocab"]["</s>"] = max(state["model"]["vocab"].values()) + 1
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|endoftext|>")
    assert "</s>" in other.get_vocab()
    with pytest.raises(UserError, match="must be one token"):
        get_template("mistral", other)
