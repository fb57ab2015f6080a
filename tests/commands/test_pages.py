"""README.md and docs/: every command on them is typed, and every link, flag, path and figure is there.

test_before_training, test_after_training, test_launch and test_extending type the commands of their pages; this file
types all the others. A command that no test can run stands in `NOT_RUN`, with the reason. test_languages compares the
Chinese pages with the English ones.
"""

import dataclasses
import importlib
import importlib.util
import io
import json
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import test_after_training
import test_before_training
import test_extending
import test_launch
from conftest import ROOT
from pages import PAGES, anchors, blocks, commands, inline_code, links, read, section

import utils.script
from utils.template import template_dict

ELSEWHERE = {
    "docs/before_training.md": test_before_training.COMMANDS,
    "docs/after_training.md": [*test_after_training.OURS, test_after_training.SERVE],
    "docs/launching.md": [*test_launch.ONE_MACHINE, *test_launch.ON_EACH_MACHINE, test_launch.WITHOUT_A_GPU],
    "docs/extending.md": test_extending.COMMANDS,
}
# how a command begins → why no test runs it
NOT_RUN = {
    "pip install -r requirements.txt": "CI runs these two by themselves",
    'pip install "transformers[serving]': "the development requirements have what it installs",
    "python -m pytest tests/": "the tests themselves",
    "python -m benchmarks.gpu_throughput --table": "tests/benchmarks/test_gpu_throughput.py compares its table",
    "python -m benchmarks.real_model --rows": "tests/benchmarks/test_real_model.py runs it on a toy",
    "deepspeed --hostfile hosts main_train.py": "needs ssh between machines",
    "python main_train.py --model_name_or_path smollm2": "test_smollm2.py trains it, where its package can be had",
    "python -m utils.script.infer --model_path smollm2": "test_smollm2.py has it answer this question",
    "vllm serve": "another program, as the page says",
    "ollama create": "another program, as the page says",
    "python convert_hf_to_gguf.py": "another program, as the page says",
    "tensorboard": "another program, which serves until it is stopped",
}
# every training below: the flags of the run in output/sft as well, so that it can be resumed
SHORT = [
    "--max_steps", "2", "--save_steps", "1", "--eval_steps", "1", "--per_device_train_batch_size", "4",
    "--logging_steps", "1", "--report_to", "none", "--disable_tqdm", "true",
]  # fmt: skip
DOCUMENTS = (*PAGES, "README_zh.md", "CONTRIBUTING.md", *(
    str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("*/**/*.md"))
    if path.parts[len(ROOT.parts)] in ("docs", "train_args", "benchmarks", "data", "llm_tricks", "chat_template")
))  # fmt: skip


def is_not_run(command: str) -> bool:
    return any(command.startswith(beginning) for beginning in NOT_RUN)


HERE = list(
    dict.fromkeys(
        command
        for page in PAGES
        for command in commands(page)
        if command not in ELSEWHERE.get(page, ()) and not is_not_run(command)
    )
)


# ---------------------------------------------------------------------- commands
def test_each_exception_is_needed():
    """A command that is no longer printed is no exception; one that is typed elsewhere stands on its page."""
    printed = [command for page in PAGES for command in commands(page)]
    assert [beginning for beginning in NOT_RUN if not any(c.startswith(beginning) for c in printed)] == []
    for page, typed in ELSEWHERE.items():
        assert set(typed) <= set(commands(page)), page


def test_a_fresh_clone_has_its_two_commands():
    first, second = [commands("README.md", "## Start")[at] for at in (0, -1)]
    assert first == "pip install -r requirements.txt && python main_train.py"
    assert second == "pip install -r requirements.txt -r requirements-dev.txt && python -m pytest"
    assert read(".ci/run").rstrip().endswith(second.replace("pip install", "pip install -q").split(" && ")[1])


@pytest.fixture(scope="module")
def sft_run(tmp_path_factory):
    """A run of two steps that was stopped after its first."""
    import main_train

    folder = tmp_path_factory.mktemp("pages") / "sft"
    main_train.main(["--output_dir", str(folder), "--row_ledger", "true", *SHORT])
    shutil.rmtree(folder / "checkpoint-2")
    return folder


@pytest.fixture
def folder(tmp_path, sft_run):
    """Where commands are typed: a user's files, and the project's data and recipes."""
    (tmp_path / "data").symlink_to(ROOT / "data")
    shutil.copytree(ROOT / "train_args", tmp_path / "train_args")
    shutil.copy(tmp_path / "train_args/sft/base.py", tmp_path / "train_args/sft/mine.py")
    for name, sample in (("my_rows", "sft_data"), ("my_pairs", "dpo_multi_data"), ("more_rows/a", "sft_eval_data")):
        lines = (ROOT / "data" / f"{sample}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / f"{name}.jsonl").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines[:20]), encoding="utf-8")
    german = [json.dumps({"frage": f"Was ist {n} + 1?", "antwort": str(n + 1)}) + "\n" for n in range(20)]
    (tmp_path / "german.jsonl").write_text("".join(german), encoding="utf-8")
    (mixture,) = blocks(section("docs/data.md", "## Mixtures"), "yaml")
    (tmp_path / "mix.yaml").write_text(mixture, encoding="utf-8")
    return tmp_path


def words_of(command: str, folder, sft_run) -> list[str]:
    """The words of a command, with a small model for those of a hub, and with the runs that it takes as given."""
    words = shlex.split(re.sub(r"checkpoint-\d+", "checkpoint-1", command.replace("sft-<time>", "sft")))
    for at, word in enumerate(words):
        if re.fullmatch(r"[A-Z]\w+/[\w.-]+", word):
            words[at] = str(ROOT / "data" / "tiny_model")
        given = re.match(r"output/(sft|mine)\b", word)
        is_written = words[at - 1] == "--output_dir" and "--resume_from_checkpoint" not in words
        if given and not is_written and not (folder / given[0]).exists():
            shutil.copytree(sft_run, folder / given[0])
    return words


@pytest.mark.slow
@pytest.mark.usefixtures("fast_processes")
@pytest.mark.parametrize("command", HERE)
def test_a_command_runs(command, folder, sft_run, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    # `--write` is not to mend a stale page of the project, which tests/script/test_show.py looks at
    monkeypatch.setattr("utils.script.show_template.ROOT", folder)
    monkeypatch.setattr("utils.script.show_template.CATALOGUE", folder / "catalogue" / "README.md")
    words = words_of(command, folder, sft_run)
    if words[0] == "cp":
        subprocess.run(words, check=True)
        return
    assert words[0] == "python", f"{words[0]} is not run here: name {command!r} in NOT_RUN, with the reason"
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is 7 + 8?\n/exit\n"))
    if "--help" in words:
        done = subprocess.run(
            [sys.executable, ROOT / words[1], *words[2:]], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0 and "--train_data_path" in done.stdout
    elif words[1] == "main_train.py":
        import main_train

        main_train.main([*words[2:], *SHORT])
    else:
        assert words[1] == "-m"
        code = importlib.import_module(words[2]).main(words[3:])
        assert code in ((0, 1) if "doctor" in words[2] else (None, 0)), capsys.readouterr().out
        assert capsys.readouterr().out.strip()


# ---------------------------------------------------------------------- links
@pytest.mark.parametrize("page", list(dict.fromkeys(DOCUMENTS)))
def test_every_link_leads_somewhere(page):
    broken = []
    for target in links(page):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        found = file.exists() and file.resolve().is_relative_to(ROOT)
        if not found or (anchor and anchor not in anchors(str(file.resolve().relative_to(ROOT)))):
            broken.append(target)
    assert broken == []


def test_every_page_is_linked_from_the_front_page():
    linked = {target.partition("#")[0] for target in links("README.md")}
    assert set(PAGES) - {"README.md"} <= linked


# ---------------------------------------------------------------------- what the pages name
# flags of vllm, of benchmarks/compare.py and real_model.py, and of every command
OTHER_FLAGS = {"--max-lora-rank", "--generation-config", "--data", "--training", "--held_back", "--help"}


def flags_of(module) -> set[str]:
    """The flags of a command: the fields of the dataclasses in its module."""
    found = [value for value in vars(module).values() if isinstance(value, type) and dataclasses.is_dataclass(value)]
    return {f"--{field.name}" for one in found for field in dataclasses.fields(one)}


def all_flags() -> set[str]:
    from utils import args
    from utils.config.recipe import load_recipe

    names = [command.name for command in pkgutil.iter_modules(utils.script.__path__)]
    modules = [importlib.import_module(f"utils.script.{name}") for name in names]
    recipes = [load_recipe(f"train_args/{name}/base.py") for name in ("sft", "pretrain", "dpo")]
    found = set().union(*map(flags_of, [args, *modules]))
    return found | {f"--{field.name}" for recipe in recipes for field in dataclasses.fields(recipe)}


def test_every_flag_on_the_pages_exists():
    known = all_flags() | OTHER_FLAGS
    flag_of = re.compile(r"--[a-z][\w-]*")
    named = {(page, flag) for page in PAGES for code in inline_code(page) for flag in flag_of.findall(code)}
    ours = {
        (page, flag)
        for page in PAGES
        for command in commands(page)
        if "main_train.py" in command or "utils.script" in command
        for flag in flag_of.findall(command.rpartition("main_train.py")[2])
    }
    assert sorted((page, flag) for page, flag in named | ours if flag not in known) == []


FOLDERS = "utils|tests|docs|train_args|data|benchmarks|chat_template|llm_tricks|pic"


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_every_path_on_the_pages_exists(page):
    path = re.compile(rf"(?<![\w/<.])(?:{FOLDERS})/[\w./*-]+")
    named = {name for code in inline_code(page) for name in path.findall(code)}
    named -= {"train_args/backward/base.py"}  # which docs/extending.md adds
    assert sorted(name for name in named if not any(ROOT.glob(name.rstrip("/.")))) == []


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_every_module_on_the_pages_exists(page):
    named = {match[1] for match in re.finditer(r"python -m ([\w.]+)", read(page))}
    assert sorted(name for name in named if importlib.util.find_spec(name) is None) == []


def test_what_the_map_names_in_a_file_is_there():
    """A row of "Where is it decided" names files, and functions of them."""
    rows = section("docs/extending.md", "## Find your way").partition("| Where is it decided")[2].splitlines()
    for row in rows:
        codes = re.findall(r"`([^`]+)`", row.rpartition(" | ")[2])
        sources = "".join(read(code) for code in codes if code.endswith(".py"))
        missing = [code for code in codes if not code.endswith(".py") and f"def {code}(" not in sources]
        assert [code for code in missing if code not in ("auto",)] == [], row


# ---------------------------------------------------------------------- figures and tables
def test_the_table_of_templates_is_the_registry():
    rows = [line for line in section("docs/templates.md", "## Which one").splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert sorted(named) == sorted([*template_dict, "auto"])
    for name, template in template_dict.items():
        row = next(row for row in rows if f"`{name}`" in row.split("|")[1])
        assert all(model.split(" (")[0].split()[0] in row for model in template.models), name


def test_the_packages_are_those_there_are():
    from test_layout import ORDER

    rows = section("docs/extending.md", "## Find your way").partition("| Where is it decided")[0]
    assert re.findall(r"`utils/(\w+)(?:\.py)?`", rows) == list(ORDER)


def test_the_front_page_says_what_was_measured_of_the_embedded_model():
    row = next(line for line in read("data/README.md").splitlines() if line.startswith("| all |"))
    right = [int(number) for number in re.findall(r"\d+", row.split("|")[4])]
    figures = " ".join(section("README.md", "## Figures").split())
    assert f"answers {min(right[:-1])} to {max(right[:-1])} of {right[-1]} held-back questions" in figures


def test_the_linter_is_one_version_everywhere():
    version = re.search(r"^ruff==(\S+)$", read("requirements-dev.txt"), re.MULTILINE)[1]
    assert set(re.findall(r"ruff==([\d.]+)", read(".pre-commit-config.yaml"))) == {version}
    ci = read(".ci/run")
    assert ci.index("ruff check .") < ci.index("ruff format --check .") < ci.index("python -m pytest")
