"""docs/extending.md: each addition is made as the page says, and does what it says."""

import json
import textwrap
import types

import pytest
import tiny
from conftest import ROOT, write_rows
from pages import blocks, commands, section

PAGE = "docs/extending.md"
COMMANDS = [command for command in commands(PAGE) if "zephyr" in command or "contains" in command]
COMMANDS = [command for command in COMMANDS if "utils.script" in command]
# the chat template of HuggingFaceH4/zephyr-7b-beta
ZEPHYR = textwrap.dedent(
    """\
    {% for message in messages %}
    {% if message['role'] == 'user' %}
    {{ '<|user|>\\n' + message['content'] + eos_token }}
    {% elif message['role'] == 'system' %}
    {{ '<|system|>\\n' + message['content'] + eos_token }}
    {% elif message['role'] == 'assistant' %}
    {{ '<|assistant|>\\n'  + message['content'] + eos_token }}
    {% endif %}
    {% if loop.last and add_generation_prompt %}
    {{ '<|assistant|>' }}
    {% endif %}
    {% endfor %}"""
)
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "你好"},
]


def of(heading: str) -> list[str]:
    """The Python blocks of a section."""
    return blocks(section(PAGE, heading), "python")


# ---------------------------------------------------------------------- a chat template
@pytest.fixture
def zephyr():
    """The template as the page registers it, for one test."""
    from utils.template import register_template, template_dict

    exec(of("## Add a chat template")[0], {"register_template": register_template})
    yield template_dict["zephyr"]
    del template_dict["zephyr"]


def test_the_template_renders_as_the_official_one(zephyr):
    from transformers.utils.chat_template_utils import render_jinja_template

    for length in range(2, 5):
        for prompt in (False, True):
            wanted = render_jinja_template(
                [TURNS[:length]], chat_template=ZEPHYR, add_generation_prompt=prompt, eos_token="</s>"
            )[0][0]
            assert zephyr.render(TURNS[:length], prompt) == wanted


def test_every_argument_of_a_template_is_on_the_page():
    from dataclasses import fields

    from utils.template import Template

    text = section(PAGE, "## Add a chat template")
    assert [field.name for field in fields(Template) if f"`{field.name}`" not in text] == []


def test_the_commands_with_the_template(zephyr, monkeypatch, tmp_path, capsys):
    from utils.script import show_data, show_template

    monkeypatch.chdir(tmp_path)
    show, data = COMMANDS[:2]
    show_template.main(show.split()[3:])
    assert "<|user|>\nHi</s>" in capsys.readouterr().out
    tokenizer = tiny.tokenizer_for(zephyr, tiny.byte_level_tokenizer)
    model = tiny.save_tiny_model(tmp_path / "model", "mistral", tokenizer)
    show_data.main(data.replace("HuggingFaceH4/zephyr-7b-beta", model).split()[3:])
    assert "<|assistant|>\n[[" in capsys.readouterr().out


# ---------------------------------------------------------------------- a metric
def with_the_metric():
    """The module of the metrics with the page's three lines, each put where the page says."""
    source = (ROOT / "utils" / "evaluate" / "metrics.py").read_text(encoding="utf-8")
    for start, line in zip(("\nMETRICS = {", "functions = {", "labels = {"), of("## Add a metric"), strict=False):
        assert source.count(start) == 1, f"there is no one {start!r}, which the page names"
        source = source.replace(start, start + line.strip())
    module = types.ModuleType("metrics_with_contains")
    exec(compile(source, "metrics.py", "exec"), vars(module))
    return module


def test_the_metric_scores_as_its_test_says():
    metrics = with_the_metric()
    names = {"score_row": metrics.score_row}
    exec(of("## Add a metric")[3], names)
    names["test_contains_by_hand"]()
    everything = list(metrics.METRICS)
    assert "contains" in everything
    assert metrics.score_row("Paris", "Paris", everything) == dict.fromkeys(everything, 100)
    assert metrics.score_row("", "Paris", everything) == dict.fromkeys(everything, 0)
    (figure,) = metrics.score_file(["Paris", "Rome"], ["Paris"] * 2, [{"contains": 100.0}, {"contains": 0.0}])
    assert (figure.key, figure.label, figure.value) == ("contains", "reference contained", 50)


def test_the_command_with_the_metric(run_folder, monkeypatch, tmp_path):
    from utils.evaluate import methods
    from utils.script import evaluate

    metrics = with_the_metric()
    for module, names in ((evaluate, ("METRICS", "check_metrics")), (methods, ("score_row", "score_file"))):
        for name in names:
            monkeypatch.setattr(module, name, getattr(metrics, name))
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": question, "output": answer} for question, answer in tiny.LEARNED]
    write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "sft").symlink_to(run_folder)
    command = COMMANDS[2].replace("data/sft_eval_data.jsonl", "rows.jsonl")
    evaluate.main([*command.split()[3:], "--compare_base", "false"])
    figures = json.loads((tmp_path / "eval.summary.json").read_text(encoding="utf-8"))["figures"]
    assert "contains" in json.dumps(figures)
