"""`--thinking`: finds the switch of a chat template that turns thinking on and off, and sets it.

Each family has its own name for it: `enable_thinking` in Qwen3, GLM-4.5, SmolLM3 and Gemma 4, `thinking` in
DeepSeek-V3.1 and Granite. A switch counts if the prompt for an answer changes with it.
"""

import json
import re
from dataclasses import replace

from utils.runtime.errors import Problem, UserError
from utils.template.auto import AutoTemplate, chat_templates_of
from utils.template.tokenize import special_token_pattern

MODES = ("auto", "on", "off")
# name → its values for on and off
_SWITCHES = {
    "enable_thinking": (True, False),
    "thinking": (True, False),
    "reasoning": (True, False),
    "thinking_mode": ("thinking", "chat"),
    "reasoning_effort": ("high", "none"),
    "thinking_budget": (-1, 0),
}
_QUESTION = [{"role": "user", "content": "Hi"}]
_OPEN_THOUGHT = re.compile(r"(<think(?:ing)?>|\[THINK\])\s*$")


def with_thinking(template, mode: str):
    """Returns a template whose prompts turn thinking on or off.

    Args:
        template: `Template` or `AutoTemplate`.
        mode: `auto` for the template's own default, `on` or `off`.

    Raises:
        UserError: the template has no switch for it.
    """
    if mode == "auto":
        return template
    form = template if isinstance(template, AutoTemplate) else getattr(template, "_form", None)
    found = None if form is None else _find_switch(form)
    if found is None or (form.tool_use and _find_switch(form.tool_use) != found):
        raise UserError(_no_switch(template, form, mode))
    on, off = _SWITCHES[found]
    return template.with_arguments(((found, json.dumps(on if mode == "on" else off)),))


def set_thinking(tokenizer, mode: str) -> None:
    """Sets the default of the switch in a tokenizer's own chat templates.

    Raises:
        UserError: its template has no switch.
    """
    if mode == "auto":
        return
    if not tokenizer.chat_template:
        raise UserError(
            Problem(f"--thinking {mode}: there is no chat template; give --template_name", flags=("thinking",))
        )
    default, with_tools = chat_templates_of(tokenizer)
    tokens = tuple((key, value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str))
    form = AutoTemplate(default, tokens, special_token_pattern(tokenizer) or re.compile("(?!)"))._fit_input_form()
    form = replace(form, tool_use=with_tools and replace(form, chat_template=with_tools)._fit_input_form())
    with_thinking(form, mode).save_in(tokenizer)


def _find_switch(form: AutoTemplate) -> str | None:
    """Returns the name of the switch to which the prompt of a template responds; None if it has none."""
    known = form.variables()
    for name, values in _SWITCHES.items():
        if name not in known or not all(_is_known(form, value) for value in values):
            continue
        prompts = {_prompt(replace(form, arguments=((name, json.dumps(value)),))) for value in values}
        if len(prompts) == 2 and None not in prompts:
            return name
    return None


def _is_known(form: AutoTemplate, value) -> bool:
    """Whether a template's text has a value that is a text: others print whatever they are given (gpt-oss)."""
    return not isinstance(value, str) or re.search(f"(['\"]){value}\\1", form.chat_template) is not None


def _prompt(form: AutoTemplate) -> str | None:
    try:
        return form.render(_QUESTION, add_generation_prompt=True)
    except UserError:
        return None


def _no_switch(template, form: AutoTemplate | None, mode: str) -> Problem:
    label = getattr(template, "label", f"template {template.name!r}")
    always = form is not None and _OPEN_THOUGHT.search(_prompt(form) or "")
    why = f"{label} has no switch for thinking" + (": each of its prompts opens a thought" if always else "")
    names = ", ".join(_SWITCHES)
    message = f"--thinking {mode}: {why} (known: {names}); use --thinking auto, or another template"
    return Problem(message, flags=("thinking", "template_name"))
