"""Checks that a chat template fits the tokenizer and renders as the tokenizer's own."""

import re

from utils.doctor.findings import Finding
from utils.export.modelfile import template_in
from utils.runtime.errors import UserError
from utils.template.auto import AutoTemplate
from utils.template.tokenize import special_token_pattern

# what is written as one token, such as <|im_end|>, <｜end▁of▁sentence｜>, </s> and <用户>, and not Llama-2's <<SYS>>
_TOKEN = re.compile(r"<\|[^|<>\s]+\|>|<｜[^｜<>\s]+｜>|(?<!<)</?[^|｜<>\s/]+>(?!>)")
_USER, _ANSWER = {"role": "user", "content": "Hi there."}, {"role": "assistant", "content": "Hello!"}
_PROBES = {
    "one turn": ([_USER, _ANSWER], False),
    "two turns": (
        [_USER, _ANSWER, {"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}],
        False,
    ),
    "a prompt": ([_USER], True),
    "a system message": ([{"role": "system", "content": "Be brief."}, _USER, _ANSWER], False),
}
_SHOWN = 30  # characters shown of a difference


def template_findings(template, tokenizer) -> list[Finding]:
    """Checks a template against the tokenizer it is used with.

    Args:
        template: Template or AutoTemplate.
        tokenizer: a fast one.
    """
    findings = _split_tokens(template, tokenizer) + _pad(template, tokenizer)
    return findings + (_prompt(template, tokenizer) if template.name == "auto" else _differences(template, tokenizer))


def tokens_of(template) -> list[str]:
    """Returns the special tokens in a format's text, by their form: `["<|im_end|>", "<|im_start|>"]`."""
    if template.name == "auto":
        return []  # whatever its text is, the tokenizer brought both
    found = set(_TOKEN.findall(template.text()))
    return sorted(found | {token for token in (template.bos.strip(), template.stop_token()) if token})


def _split_tokens(template, tokenizer) -> list[Finding]:
    vocabulary = tokenizer.get_vocab()
    pieces = {}
    for token in tokens_of(template):
        # within a text, since a piece of the vocabulary may look like the token and never be made
        ids = tokenizer(f"a{token}a", add_special_tokens=False)["input_ids"]
        if vocabulary.get(token) not in ids:
            pieces[token] = tokenizer.convert_ids_to_tokens(tokenizer(token, add_special_tokens=False)["input_ids"])
    if not pieces:
        return []
    named = ", ".join(f"{token!r} is {len(made)} tokens" for token, made in pieces.items())
    message = f"template {template.name!r} on the tokenizer of {tokenizer.name_or_path!r}: {named}"
    return [Finding("TEMPLATE_TOKEN_SPLIT", message)]


def _pad(template, tokenizer) -> list[Finding]:
    stop = template.stop_token()
    if tokenizer.pad_token != stop:
        return []
    return [Finding("PAD_IS_STOP", f"the tokenizer pads with {stop!r}, which also ends an answer")]


def _prompt(template, tokenizer) -> list[Finding]:
    """Checks that the generation prompt ends with the tokens that stand before a trained answer."""
    if rest := template.prompt_only_suffix():
        message = f"the chat template's prompt ends with {rest!r}, and an answer without thinking is trained without it"
        return [Finding("PROMPT_NOT_FOLLOWED", message)]
    texts = template.render([_USER], add_generation_prompt=True), template.render([_USER, _ANSWER])
    prompt, row = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    if row[: len(prompt)] == prompt:
        return []
    # Qwen3.6: the prompt ends with <think> and a line feed, the row goes on with <think> and two, which are one token
    at = next(i for i, (one, other) in enumerate(zip(prompt, row, strict=False)) if one != other)
    shown = [tokenizer.decode(ids[at : at + 2]) for ids in (prompt, row)]
    message = (
        f"the chat template's prompt ends with {shown[0]!r}, which is another token in a row, {shown[1]!r}: an answer "
        "is generated after other tokens than it was trained after"
    )
    return [Finding("PROMPT_NOT_FOLLOWED", message)]


def _differences(template, tokenizer) -> list[Finding]:
    """Compares both renderings of a few conversations, up to the first difference."""
    if not tokenizer.chat_template:
        return []
    tokens = tuple((key, value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str))
    own = AutoTemplate(tokenizer.get_chat_template(), tokens, special_token_pattern(tokenizer))
    for name, (messages, prompt) in _PROBES.items():
        ours, theirs = (_rendered(form, messages, prompt) for form in (template, own))
        if ours != theirs:
            message = (
                f"{name}: template {template.name!r} and the tokenizer's own differ {_first_difference(ours, theirs)}"
            )
            return [Finding("TEMPLATE_DIFFERS", message, remedy=_flag_for(template, tokenizer))]
    return []


def _flag_for(template, tokenizer) -> str:
    """Returns the advice on which `--template_name` to give."""
    same = template_in(tokenizer)
    name = same.name if same else "auto"
    if same is None:
        try:
            AutoTemplate.of(tokenizer)
        except UserError:
            return (
                f"Keep --template_name {template.name}: the tokenizer's own format cannot be trained exactly, so that "
                "a model which knows it learns this one anew"
            )
    return f"Give --template_name {name} to train the tokenizer's own; a base model may be taught any"


def _rendered(template, messages, prompt: bool) -> str | None:
    try:
        return template.render(messages, add_generation_prompt=prompt)
    except UserError:
        return None


def _first_difference(ours: str | None, theirs: str | None) -> str:
    """Describes where two renderings differ: `"from character 12 on: '…' against '…'"`."""
    if ours is None or theirs is None:
        return f"in that {'the former' if ours is None else 'the latter'} refuses it"
    place = next((i for i, both in enumerate(zip(ours, theirs, strict=False)) if len(set(both)) > 1), None)
    place = min(len(ours), len(theirs)) if place is None else place
    start = max(0, place - _SHOWN // 2)
    ours, theirs = (text[start : place + _SHOWN] for text in (ours, theirs))
    return f"from character {place} on: {ours!r} against {theirs!r}"
