"""docs/extending.md: each addition is made as the page says, and does what it says."""

import json
import re
import shutil
import subprocess
import sys
import textwrap
import types

import pytest
import tiny
from conftest import ROOT, write_rows
from pages import blocks, commands, section

PAGE = "docs/extending.md"


def typed(word: str) -> list[str]:
    """The commands of the page with a word of one of its examples; pytest's are left out."""
    return [command for command in commands(PAGE) if word in command and "pytest" not in command]


OF_TEMPLATE, OF_METRIC, OF_ADAPTER, OF_TASK = map(typed, ("zephyr", "contains", "train_mode miss", "backward"))
OF_START = typed("gaussian")
COMMANDS = [*OF_TEMPLATE, *OF_METRIC, *OF_ADAPTER, *OF_START, *OF_TASK]
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
    show, data = OF_TEMPLATE
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
    for module, names in ((evaluate, ("check_metrics",)), (methods, ("score_row", "score_file"))):
        for name in names:
            monkeypatch.setattr(module, name, getattr(metrics, name))
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": question, "output": answer} for question, answer in tiny.LEARNED]
    write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "sft").symlink_to(run_folder)
    command = OF_METRIC[0].replace("data/sft_eval_data.jsonl", "rows.jsonl")
    evaluate.main([*command.split()[3:], "--compare_base", "false"])
    figures = json.loads((tmp_path / "eval.summary.json").read_text(encoding="utf-8"))["figures"]
    assert "contains" in json.dumps(figures)


# ---------------------------------------------------------------------- an adapter, and a task
def test_the_places_of_an_option_of_lora_are_those_on_the_page():
    rows = [line for line in section(PAGE, "## Add an adapter").splitlines() if line.startswith("| `utils/")]
    rows = [row for row in rows if "Field of" not in row]
    assert len(rows) >= 2
    for row in rows:
        file, *names = re.findall(r"`([A-Za-z_/.]+)`", row.rpartition(" | ")[0])
        source = (ROOT / file).read_text(encoding="utf-8")
        assert "use_rslora" in source, file
        assert [name for name in names if name not in source] == [], file
    # and no other module names the option, but those that convert a finished adapter
    named = {str(path.relative_to(ROOT)) for path in (ROOT / "utils").rglob("*.py") if "use_rslora" in path.read_text()}
    assert named - {"utils/model/pissa.py"} == {re.search(r"`([\w/.]+)`", row)[1] for row in rows}


TYPE_IN = """
import json, sys
from importlib import import_module
for words in json.load(sys.stdin):
    name = words[1].removesuffix(".py") if words[1] != "-m" else words[2]
    code = import_module(name).main(words[2:] if words[1] != "-m" else words[3:])
    assert code in (None, 0, 1) or isinstance(code, dict), words
"""


@pytest.mark.slow
@pytest.mark.usefixtures("fast_processes")
def test_the_adapter_and_the_task_are_added_as_the_page_says(tmp_path):
    """In a copy of the project: the page's lines, each put where it says, and its commands."""
    for name in ("utils", "train_args"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "main_train.py", tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    function, adapter, choices = of("## Add an adapter")
    file, recipe, row = of("## Add a task")
    edit(tmp_path / "utils/args.py", r"^ +init_lora_weights: .*\n", choices)
    edit(tmp_path / "utils/model/adapter.py", r"(?=^LORA = Adapter)", function)
    edit(tmp_path / "utils/model/adapter.py", r"(?<=^ADAPTERS = \{\n)", adapter)
    (tmp_path / "utils/tasks/backward.py").write_text(file, encoding="utf-8")
    shutil.copytree(tmp_path / "train_args/sft", tmp_path / "train_args/backward")
    edit(tmp_path / "train_args/backward/base.py", r"^ +task_types: .*\n", recipe)
    edit(tmp_path / "utils/tasks/__init__.py", r"(?<=^MODULES = \{\n)", row)

    short = ["--max_steps", "1", "--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "true"]
    words = [command.split() for command in [*OF_ADAPTER, *OF_START, *OF_TASK]]
    words = [[*line, *short, "--output_dir", f"output/{at}"] if line[1] == "main_train.py" else line
             for at, line in enumerate(words)]  # fmt: skip
    command, lines = [sys.executable, "-c", TYPE_IN], json.dumps(words)
    done = subprocess.run(command, cwd=tmp_path, input=lines, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    first = json.loads((ROOT / "data/sft_data.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert f"[[{first['instruction']}" in done.stdout and f"user\n{first['output']}" in done.stdout
    records = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted(tmp_path.glob("output/*/train_args.json"))
    ]
    assert [record["common"]["task_type"] for record in records] == ["sft", "sft", "backward"]
    assert records[0]["common"]["train_mode"] == "miss" and records[1]["common"]["init_lora_weights"] == "gaussian"


def edit(path, pattern: str, text: str) -> None:
    """Puts a text in place of the one match of a pattern."""
    source, count = re.subn(pattern, lambda _: text, path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert count == 1, f"{path} has {count} of {pattern}"
    path.write_text(source, encoding="utf-8")
