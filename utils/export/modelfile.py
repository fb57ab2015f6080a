"""A Modelfile: what `ollama create` needs to make a model of a folder that speaks as it was trained.

    FROM .                        the folder the file lies in
    TEMPLATE \"""…\"""              the chat format in Go's syntax, from `utils.template.go`
    SYSTEM \"""…\"""                the system message of a conversation that brings none
    PARAMETER stop "<|im_end|>"   what ends an answer

Whoever tokenises a prompt for a GGUF file, Ollama or llama.cpp, sets the BOS token before it where the file's
`tokenizer.ggml.add_bos_token` says so, and both converters take that from `add_bos_token` in tokenizer_config.json.
transformers neither reads nor writes that key where there is a tokenizer.json. So it is written here as what was
trained: true where a rendering begins with the BOS token, which TEMPLATE then leaves out, and false elsewhere, also
where that token opens every turn.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from utils.runtime.errors import UserError
from utils.template import Template, get_template, template_dict
from utils.template.auto import derive_template
from utils.template.go import to_go

_PROBES = [
    [{"role": "user", "content": " Hi\n"}],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": " Yo "},
        {"role": "user", "content": "And {{ so }}?"},
    ],
    # a template that leaves out earlier thinking is another in its second turn
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYo"},
        {"role": "user", "content": "And?"},
    ],
]
NAME = "Modelfile"


def template_in(tokenizer, likely: str | None = None) -> Template | None:
    """The template that renders as a tokenizer's own chat template does: a registered one, or one read from it.

    Args:
        tokenizer: with or without a chat template.
        likely: the name to try first.

    Returns:
        None where there is no such template: Jinja is a language, and has no translation to Go's in general.
    """
    wanted = [_own_rendering(tokenizer, messages) for messages in _PROBES] if tokenizer.chat_template else []
    if not any(wanted):
        return None
    for template in _candidates(tokenizer, likely):
        if [_rendering(template, messages) for messages in _PROBES] == wanted:
            return template
    return None


def _candidates(tokenizer, likely: str | None) -> Iterator[Template]:
    for name in sorted(template_dict, key=lambda name: name != likely):
        try:
            yield get_template(name, tokenizer)
        except UserError:
            continue  # made for a tokenizer with other tokens
    if derived := derive_template(tokenizer):
        yield derived
        yield replace(derived, strip=True)


def _own_rendering(tokenizer, messages: list[dict]) -> str | None:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception:  # Jinja's own, or whatever the template's code runs into
        return None


def _rendering(template: Template, messages: list[dict]) -> str | None:
    try:
        return template.render(messages, add_generation_prompt=True)
    except UserError:
        return None


def leading_bos(template: Template, tokenizer) -> str:
    """The BOS token that the program which tokenises is to set, since every prompt begins with it; else an empty text.

    Where it opens every turn, as `<|im_start|>` does in SmolLM2, it is a part of the turns and stays in their text: a
    conversation may begin with any of them.
    """
    bos = tokenizer.bos_token or ""
    if bos and not template.bos and any((form or "").startswith(bos) for form in (template.system, template.assistant)):
        return ""
    return bos if bos and template.render(_PROBES[0], add_generation_prompt=True).startswith(bos) else ""


def modelfile(template: Template, tokenizer, stop_ids: int | list[int] | None) -> str:
    """The text of a Modelfile.

    Args:
        template: the format that was trained, with the tokenizer's tokens in it.
        tokenizer: names the tokens.
        stop_ids: what generation ends with, the `eos_token_id` of generation_config.json.
    """
    added = leading_bos(template, tokenizer)
    lines = [f"# {template.name}: {template.source}", "FROM .", ""]
    lines += [f'TEMPLATE """{to_go(template, added)}"""', ""]
    system = template.default_system
    # without a SYSTEM the template says its default by itself; with one, /show and the like know it
    if system and '"""' not in system and all(char.isprintable() or char == "\n" for char in system):
        lines += [f'SYSTEM """{system}"""', ""]
    stop_ids = [stop_ids] if isinstance(stop_ids, int) else stop_ids or []
    stops = [template.stop_token(), *tokenizer.convert_ids_to_tokens(stop_ids)]
    # Ollama's parser takes no escapes and drops what is not printed
    lines += [f'PARAMETER stop "{stop}"' for stop in dict.fromkeys(stops) if stop and stop.isprintable()]
    return "\n".join(lines) + "\n"


def write_modelfile(folder: Path, template: Template, tokenizer, stop_ids: int | list[int] | None) -> Path:
    """Writes `Modelfile` into a model's folder, and `add_bos_token` into its tokenizer_config.json.

    Returns:
        the file.
    """
    config = folder / "tokenizer_config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    values["add_bos_token"] = bool(leading_bos(template, tokenizer))
    config.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    file = folder / NAME
    file.write_text(modelfile(template, tokenizer, stop_ids), encoding="utf-8")
    return file
