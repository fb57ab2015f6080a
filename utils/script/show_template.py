"""Shows a chat format, or writes the catalogue of all of them.

python -m utils.script.show_template --name qwen
python -m utils.script.show_template --write        # chat_template/README.md
"""

from dataclasses import dataclass
from pathlib import Path

from utils.config.flags import arg, make_parser, read_flags
from utils.runtime.command import run_command
from utils.runtime.errors import raise_if_any
from utils.runtime.log import setup_logging
from utils.runtime.text import markdown_table
from utils.storage.files import ROOT
from utils.template import Template, get_template, template_dict, unknown_template

CATALOGUE = ROOT / "chat_template" / "README.md"
_SYSTEM = {"role": "system", "content": "Be brief."}
_ONE_TURN = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
_TOOL = {"name": "weather", "description": "Tells the weather.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}  # fmt: skip
_CALL = {"id": "a1b2c3d4e", "type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}}
_TOOL_TURNS = [
    {"role": "user", "content": "北京天气？", "tools": [{"type": "function", "function": _TOOL}]},
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "tool_call_id": "a1b2c3d4e", "content": "22 °C"},
    {"role": "assistant", "content": "22 °C."},
]
_DAY = "2026-01-31"  # the date that gpt-oss shows here
_TWO_TURNS = [*_ONE_TURN, {"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]


@dataclass
class ShowTemplateArgs:
    """Flags of this command."""

    name: str | None = arg(None, "The format to print.")
    template_name: str | None = arg(None, "The same as --name; main_train.py's flag.")
    write: bool = arg(False, "Update chat_template/README.md from the registry.")


def describe(template: Template) -> str:
    """Describes a format as Markdown: its properties, and conversations as the model sees them."""
    facts = [
        ("for · 适用模型", ", ".join(template.models)),
        ("source · 出处", template.source),
        ("BOS · 起始符", _code(template.bos) if template.bos else "none in the text · 文本中没有"),
        ("default system · 默认系统消息", _code(template.default_system) if template.default_system else "none · 无"),
        ("stop token · 停止符", _code(template.stop_token())),
        ("closes a conversation · 对话结尾", _code(template.end or template.closing or template.after_stop) or "–"),
        ("spaces around a content · 首尾空白", "removed · 去除" if template.strip else "kept · 保留"),
        ("tools · 工具", "yes · 支持" if template.has_tools else "no · 不支持"),
    ]
    lines = [f"## {template.name}", "", *(f"- {name}: {value}" for name, value in facts), ""]
    examples = [("One turn · 一轮", _ONE_TURN), ("Several turns · 多轮", _TWO_TURNS)]
    if template.system is not None or template.system_with_user is not None:
        examples.insert(1, ("With a system message · 带系统消息", [_SYSTEM, *_ONE_TURN]))
    else:
        lines += ["A system message is refused. · 不接受系统消息。", ""]
    if template.has_tools:
        examples.append(("With tools · 带工具", _TOOL_TURNS))
    for title, messages in examples:
        text = template.render(messages)
        fence = "````" if "```" in text else "```"  # DeepSeek-V3 writes calls in fences of three
        lines += [f"{title}:", "", f"{fence}text", text, fence, ""]
    lines += ["Prompt · 提示:", "", "```text", template.render(_ONE_TURN[:1], add_generation_prompt=True), "```", ""]
    return "\n".join(lines)


def _code(text: str) -> str:
    return f"`{text}`".replace("\n", "\\n") if text else ""


def catalogue() -> str:
    """Returns the text of chat_template/README.md."""
    head = [
        "# Chat templates · 对话模板",
        "",
        "Written by `python -m utils.script.show_template --write` from the registry in `utils/template/catalogue.py`.",
        "A test fails when this page is stale. In `default`, BOS and the stop token are those of the tokenizer, shown",
        "here as `<s>` and `</s>`.",
        "",
        "由 `python -m utils.script.show_template --write` 根据 `utils/template/catalogue.py` 里的注册表生成；",
        "页面过期时测试会失败。",
        "`default` 的起始符和停止符取自分词器，这里写作 `<s>` 和 `</s>`。",
        "",
    ]
    templates = [get_template(name, date=_DAY) for name in template_dict]
    names = markdown_table(
        ["name · 名字", "for · 适用模型", "stop token · 停止符", "tools · 工具"],
        [
            (
                f"[{t.name}](#{t.name.replace('.', '')})",
                ", ".join(t.models),
                f"`{t.stop_token()}`",
                "✓" if t.has_tools else "",
            )
            for t in templates
        ],  # fmt: skip
    )
    return "\n".join([*head, names, "", *(describe(template) for template in templates)]).rstrip() + "\n"


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    values, _, problems = read_flags(make_parser([ShowTemplateArgs], "utils.script.show_template", __doc__), argv)
    args = ShowTemplateArgs(**values)
    flag = "name" if args.name is not None else "template_name"
    args.name = getattr(args, flag)
    if args.name == "auto":
        problems.append(f"--{flag} 'auto' is the tokenizer's own chat template; show_data shows rows in it, and takes "
                        "--model_name_or_path and --template_name")  # fmt: skip
    elif args.name is not None and args.name not in template_dict:
        problems.append(unknown_template(args.name, flag))
    if args.name is None and not args.write:
        problems.append(f"nothing to do: give --name (one of {', '.join(template_dict)}) or --write")
    raise_if_any(problems)
    if args.name:
        print(describe(get_template(args.name, date=_DAY)))
    if args.write:
        Path(CATALOGUE).parent.mkdir(exist_ok=True)
        CATALOGUE.write_text(catalogue(), encoding="utf-8")
        print(f"written: {CATALOGUE.relative_to(ROOT)}")


if __name__ == "__main__":
    run_command(main)
