"""Writes a Modelfile, from which `ollama create` makes a model that uses the chat format it was trained on.

    FROM .                        the folder of the file
    TEMPLATE \"""…\"""              the chat format in Go's syntax, from `utils.template.go`
    SYSTEM \"""…\"""                the system message of conversations without one
    PARAMETER stop "<|im_end|>"   a stop token of an answer

With a GGUF file, Ollama and llama.cpp put the BOS token before a prompt if `tokenizer.ggml.add_bos_token` is true, and
both converters take that from `add_bos_token` in tokenizer_config.json, which transformers neither reads nor writes
beside a tokenizer.json. So it is written here: true if the chat format begins with the BOS token, which TEMPLATE then
leaves out; false otherwise, also if that token opens every turn.
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
    # some templates leave out the thinking of earlier turns
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYo"},
        {"role": "user", "content": "And?"},
    ],
]
NAME = "Modelfile"


def has_go_form(template: Template | None) -> bool:
    """Whether a chat format can be written as a Modelfile's TEMPLATE."""
    return template is not None and not template.jinja_only and not template.jinja_system


def template_in(tokenizer, likely: str | None = None) -> Template | None:
    """The Template that renders as a tokenizer's chat template does: a registered one, or one derived from it.

    Args:
        tokenizer: with or without a chat template.
        likely: the name to try first.

    Returns:
        None if there is no such template, as Jinja cannot be translated in general.
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
            continue  # for a tokenizer with other tokens
    if derived := derive_template(tokenizer):
        yield derived
        yield replace(derived, strip=True)


def _own_rendering(tokenizer, messages: list[dict]) -> str | None:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception:  # the template's code can raise anything
        return None


def _rendering(template: Template, messages: list[dict]) -> str | None:
    try:
        return template.render(messages, add_generation_prompt=True)
    except UserError:
        return None


def leading_bos(template: Template, tokenizer) -> str:
    """The BOS token if every prompt begins with it, so that the tokenising program is to set it; else an empty string.

    If it opens every turn, as `<|im_start|>` does in SmolLM2, it belongs to the turns and stays in TEMPLATE.
    """
    bos = tokenizer.bos_token or ""
    if bos and not template.bos and any((form or "").startswith(bos) for form in (template.system, template.assistant)):
        return ""
    return bos if bos and template.render(_PROBES[0], add_generation_prompt=True).startswith(bos) else ""


def modelfile(template: Template, tokenizer, stop_ids: int | list[int] | None) -> str:
    """The text of a Modelfile.

    Args:
        template: the chat format, with the tokenizer's tokens in it.
        tokenizer: the model's.
        stop_ids: `eos_token_id` of generation_config.json.
    """
    added = leading_bos(template, tokenizer)
    lines = [f"# {template.name}: {template.source}"]
    if template.shows_date:
        lines.append(f"# TEMPLATE shows the day on which it was written, {template.date}")
    if template.has_tools:
        lines.append(
            "# TEMPLATE has no tools, so that Ollama refuses requests with tools; chat_template.jinja has them"
        )
    lines += ["FROM .", ""]
    lines += [f'TEMPLATE """{to_go(template, added)}"""', ""]
    system = template.default_system
    # TEMPLATE contains the default system message as well; with SYSTEM, /show prints it
    if system and '"""' not in system and all(char.isprintable() or char == "\n" for char in system):
        lines += [f'SYSTEM """{system}"""', ""]
    stop_ids = [stop_ids] if isinstance(stop_ids, int) else stop_ids or []
    stops = [template.stop_token(), *tokenizer.convert_ids_to_tokens(stop_ids)]
    # Ollama's parser knows no escapes and drops characters that are not printable
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
