"""Problems carry what code needs to know of them, and no code reads that out of their text."""

import ast
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from transformers import TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from utils.args import parse_args
from utils.config.deepspeed import _read_mismatch
from utils.config.flags import flags_in
from utils.doctor.codes import CODES
from utils.runtime.command import run_command
from utils.runtime.errors import ERROR_FILE, Problem, UserError, raise_if_any, read_problems, refusal

# where the text of another library's error is read, since nothing else tells: file, function, and whose text it is
ALLOWED = {
    ("utils/runtime/errors.py", "is_disk_error"): "torch, safetensors and Arrow write to disk by their own errors",
    ("utils/runtime/errors.py", "first_line"): "shows the beginning of any library's text",
    ("utils/runtime/errors.py", "in_one_line"): "shows any library's text",
    ("utils/config/flags.py", "flags_in"): "transformers' TrainingArguments names flags in its texts alone",
    ("utils/data/json_rows.py", "_ends_early"): "CPython's json tells an open quotation mark in its message alone",
}
_METHODS = {"startswith", "endswith", "removeprefix", "removesuffix", "split", "rsplit", "splitlines", "partition",
            "rpartition", "find", "rfind", "index", "count", "replace"}  # fmt: skip
_TEXTS = {"message", "msg", "reason", "remedy", "args"}  # attributes that hold the text of a problem, a row, an error


def _functions(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def _error_names(function: ast.AST) -> set[str]:
    """The names that hold an error or a problem: of `except … as`, and loop variables over problems."""
    names = {node.name for node in ast.walk(function) if isinstance(node, ast.ExceptHandler) and node.name}
    for argument in function.args.args:
        kind = ast.unparse(argument.annotation) if argument.annotation else ""
        if re.search(r"Exception|Error\b|Problem\b", kind):
            names.add(argument.arg)
    for node in ast.walk(function):
        if isinstance(node, ast.For | ast.comprehension) and re.search(r"problems$", ast.unparse(node.iter)):
            names |= {name.id for name in ast.walk(node.target) if isinstance(name, ast.Name)}
    return names


def _is_text_of_error(node: ast.AST, names: set[str]) -> bool:
    """Whether an expression is the text of an error: `str(error)`, `error.args[0]`, `problem.message`, a problem."""
    if isinstance(node, ast.JoinedStr):
        return any(_is_text_of_error(part.value, names) for part in node.values if isinstance(part, ast.FormattedValue))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("str", "repr"):
        return any(_is_text_of_error(argument, names) for argument in node.args)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):  # str(error).lower(), .strip(), …
        return _is_text_of_error(node.func.value, names)
    if isinstance(node, ast.Subscript):
        return _is_text_of_error(node.value, names)
    if isinstance(node, ast.Attribute):
        return node.attr == "problems" or (node.attr in _TEXTS and _is_text_of_error(node.value, names))
    return isinstance(node, ast.Name) and (node.id in names or node.id == "problems")


def matches(source: str) -> list[tuple[str, int, str]]:
    """The places of a source that compare or take apart the text of an error: function, line, expression."""
    found = []
    for function in _functions(ast.parse(source)):
        names = _error_names(function)
        for node in ast.walk(function):
            hit = None
            if isinstance(node, ast.Compare) and any(isinstance(op, ast.In | ast.NotIn) for op in node.ops):
                # a whole problem may be looked for in a list of them; a text in one may not
                if not (isinstance(node.left, ast.Name) and node.left.id in names):
                    hit = any(_is_text_of_error(side, names) and not _is_list(side) for side in node.comparators)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                called = node.func
                if isinstance(called.value, ast.Name) and called.value.id == "re":
                    hit = any(_is_text_of_error(argument, names) for argument in node.args)
                elif called.attr in _METHODS:
                    hit = _is_text_of_error(called.value, names) and not _is_list(called.value)
                elif called.attr in ("match", "search", "fullmatch", "findall", "finditer"):
                    hit = any(_is_text_of_error(argument, names) and not _is_list(argument) for argument in node.args)
            if hit:
                found.append((function.name, node.lineno, ast.unparse(node)))
    return found


def _is_list(node: ast.AST) -> bool:
    return isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node).endswith("problems")


SOURCES = [*sorted((ROOT / "utils").rglob("*.py")), ROOT / "main_train.py"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_reads_the_text_of_an_error(path: Path):
    file = str(path.relative_to(ROOT))
    found = matches(path.read_text(encoding="utf-8"))
    wrong = [f"{file}:{line} {text}" for function, line, text in found if (file, function) not in ALLOWED]
    assert not wrong, "give the problem a code, flags, file or line, and read that:\n" + "\n".join(wrong)


def test_every_allowed_place_is_still_there():
    for file, function in ALLOWED:
        found = matches((ROOT / file).read_text(encoding="utf-8"))
        assert function in [name for name, _, _ in found] or function in ("in_one_line", "is_disk_error"), function
        assert f"def {function}(" in (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "line",
    [
        'code = "A" if "must be one token" in str(error) else "B"',
        'wrong = "must be" not in f"{error}"',
        'wrong = "needs" in error.args[0]',
        'wrong = "needs" in str(error).lower()',
        'wrong = "needs" in error.problems[0].message',
        'wrong = any("--config" in problem for problem in error.problems)',
        'wrong = [problem.message.startswith("--") for problem in error.problems]',
        'text = str(error).removeprefix("error: ")',
        'text = str(error).split(": ", 1)[-1]',
        'text = error.problems[0].message.replace("--config", "--diff")',
        'found = re.match("--deepspeed .* says", str(error))',
        "found = _REFUSED.search(str(error.problems[0]))",
        'found = [name for problem in error.problems for name in re.findall("--(.*)", str(problem))]',
        'where = str(error).find("at line")',
    ],
)
def test_such_a_line_would_be_found(line):
    source = f"def read():\n    try:\n        act()\n    except UserError as error:\n        {line}\n"
    assert [found[:2] for found in matches(source)] == [("read", 5)]


def test_what_is_no_reading_of_a_text_is_let_pass():
    source = """
def read(problems: list[Problem]):
    try:
        act()
    except UserError as error:
        new = [problem for problem in error.problems if problem not in problems]
        problems.sort(key=lambda problem: problem.line)
        about = [problem for problem in new if "base_model" in problem.flags]
        return f"{error}", str(error), error.problems[0].code == "ROW_TOO_LONG"
"""
    assert matches(source) == []


# ------------------------------------------------------------------------------ problems


def test_a_problem_is_shown_as_its_message_and_its_remedy():
    assert str(Problem("--a 1 is not allowed")) == "--a 1 is not allowed"
    assert str(Problem("--a 1 is not allowed", remedy="give 2")) == "--a 1 is not allowed; give 2"
    assert Problem("x") == Problem("x", "ARGUMENTS", (), None, None, "")
    assert refusal("--a 1", "a", "b") == [Problem("--a 1", flags=("a", "b"))]


def test_an_error_takes_texts_and_problems_and_leaves_out_empty_ones():
    row = Problem("has no answer", "ROW_UNREADABLE", ("train_data_path",), "a.jsonl", 3)
    error = UserError("--a 1", "", None, Problem(""), row)
    assert error.problems == [Problem("--a 1"), row]
    assert str(error) == "2 errors:\n  1. --a 1\n  2. has no answer"
    assert error.sentences() == "--a 1; has no answer"
    assert str(UserError(row)) == "error: has no answer"
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is UserError and again.problems == error.problems


def test_raise_if_any_takes_both():
    raise_if_any([])
    with pytest.raises(UserError) as error:
        raise_if_any(["--a 1", Problem("--b 2", flags=("b",))])
    assert [problem.flags for problem in error.value.problems] == [(), ("b",)]


def test_a_command_writes_its_problems_for_the_process_that_started_it(tmp_path, monkeypatch, capsys):
    problem = Problem("--a 1", flags=("a",), file="a.jsonl", line=3)
    file = tmp_path / "problems.json"
    assert read_problems(file) is None
    monkeypatch.setenv(ERROR_FILE, str(file))
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: raise_if_any([problem]))
    assert ended.value.code == 2 and capsys.readouterr().err == "error: --a 1\n"
    assert read_problems(file).problems == [problem]
    monkeypatch.setenv(ERROR_FILE, str(tmp_path / "gone" / "problems.json"))
    with pytest.raises(SystemExit):
        run_command(lambda: raise_if_any([problem]))
    assert capsys.readouterr().err == "error: --a 1\n"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_code_is_one_of_the_doctors(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("Problem", "refusal"):
            given = [keyword.value for keyword in node.keywords if keyword.arg == "code"]
            given += node.args[1:2] if node.func.id == "Problem" else []
            codes = [value.value for value in given if isinstance(value, ast.Constant)]
            assert all(code in CODES for code in codes), f"{path}:{node.lineno}: {codes}"


def test_every_problem_of_the_arguments_says_which_flag_it_is_of():
    """What the doctor sets aside: the first flag of a problem is the first that its sentence names."""
    argv = ["--lora_rank", "0", "--learning_rat", "1", "--max_len", "many", "--val_size", "2.5", "--optim", "adamw_8",
            "--eval_strategy", "epoch", "--max_length", "3", "--save_strategy", "best", "--card_samples", "-1",
            "--train_data_path", "none.jsonl", "--template_name", "qwem", "--output_dir", "utils/args.py",
            "--report_to", "none", "tensorboard", "--deepspeed", "zero9",
            "--adapter_name_or_path", "output/none"]  # fmt: skip
    with pytest.raises(UserError) as error:
        parse_args(argv)
    assert len(error.value.problems) >= 12
    for problem in error.value.problems:
        assert problem.flags[:1] == tuple(re.findall(r"--(\w+)", str(problem))[:1]), problem


# ------------------------------------------------------------------------------ what other libraries write


def test_transformers_names_flags_in_its_text(tmp_path):
    with pytest.raises(ValueError) as error:
        TrainingArguments(output_dir=str(tmp_path), load_best_model_at_end=True, eval_strategy="no", use_cpu=True)
    assert flags_in(error.value)[:1] == ("load_best_model_at_end",)


def test_transformers_writes_a_mismatch_as_it_is_read():
    config = HfTrainerDeepSpeedConfig({"train_micro_batch_size_per_gpu": 4, "fp16": {"enabled": True}})
    config.fill_match("train_micro_batch_size_per_gpu", 2, "per_device_train_batch_size")
    config.fill_match("fp16.enabled", False, "fp16|fp16_full_eval+fp16_backend(amp)")
    assert [_read_mismatch(text) for text in config.mismatches] == [
        ("train_micro_batch_size_per_gpu", "4", "per_device_train_batch_size", "2"),
        ("fp16.enabled", "True", "", "False"),
    ]


def test_json_names_an_open_quotation_mark():
    with pytest.raises(json.JSONDecodeError) as error:
        json.loads('{"a": "b')
    assert error.value.msg.startswith("Unterminated string") and error.value.pos == 6


_WRITE = """
import resource, signal, sys, torch, datasets
from safetensors.torch import save_file
from utils.runtime.errors import is_disk_error
datasets.disable_progress_bars()
rows = datasets.Dataset.from_dict({"a": [list(range(1000))] * 1000})
weights = torch.zeros(1 << 20)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
writes = {
    "torch": lambda: torch.save({"a": weights}, f"{sys.argv[1]}/a.pt"),
    "torch, older form": lambda: torch.save(
        {"a": weights}, f"{sys.argv[1]}/b.pt", _use_new_zipfile_serialization=False
    ),
    "safetensors": lambda: save_file({"a": weights}, f"{sys.argv[1]}/a.safetensors"),
    "datasets": lambda: rows.save_to_disk(f"{sys.argv[1]}/rows"),
}
for name, write in writes.items():
    try:
        write()
    except Exception as error:
        print(name, is_disk_error(error), flush=True)
        print(name, type(error).__name__, error, file=sys.stderr)
    else:
        print(name, "wrote", flush=True)
"""


def test_a_failed_write_is_known_by_what_each_library_raises(tmp_path):
    """Files may not grow beyond 64 KiB, so that every library meets the operating system's own refusal."""
    ended = subprocess.run([sys.executable, "-c", _WRITE, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    names = ("torch", "torch, older form", "safetensors", "datasets")
    assert ended.stdout.splitlines() == [f"{name} True" for name in names], ended.stdout + ended.stderr


def test_a_failed_load_names_the_hub_without_its_address():
    from utils.runtime.errors import load_failure

    error = OSError("We couldn't connect to 'https://example.org/x' to load the files.\nSee https://example.org/y.")
    text = load_failure("tokenizer", "--model_name_or_path", "a/b", error)
    assert "connect to 'the hub' to load the files. See the hub" in text and "example" not in text
