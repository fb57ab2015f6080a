"""llm_tricks: every notebook, script, exercise and README, found by where it lies."""

import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

from benchmarks.tables import table_in
from llm_tricks.experiment import run_experiment, with_origin
from llm_tricks.notebook import execute, notebooks

HERE = ROOT / "llm_tricks"
FOLDERS = sorted(path for path in HERE.iterdir() if path.is_dir() and path.name != "__pycache__")
LONGEST_CELL = 30


def tagged(cell, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])


def text_of(cell) -> str:
    """What a cell printed or showed, pictures left out."""
    return "".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs)


def without_numbers(text: str) -> str:
    """What must be the same on every machine."""
    return re.sub(r"[-+]?\d[\d.,]*(e[-+]?\d+)?", "N", text).replace(" ", "")


def solutions_of(folder: Path) -> list[str]:
    """The parts of solutions.py, each with the imports at its top."""
    head, *parts = re.split(r"^# exercise \d+.*$", (folder / "solutions.py").read_text(), flags=re.MULTILINE)
    return [head + part for part in parts]


def with_solutions(notebook, folder: Path):
    """The notebook with each check cell a second time, after the exercise's solution."""
    cells, solutions = [], iter(solutions_of(folder))
    for cell in notebook.cells:
        cells.append(cell)
        if tagged(cell, "check"):
            for source in (next(solutions), cell.source):
                cells.append(nbformat.v4.new_code_cell(source, metadata={"tags": ["added"]}))
    assert next(solutions, None) is None, "as many solutions as exercises"
    return nbformat.v4.new_notebook(cells=cells)


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_notebook_runs_its_solutions_are_right_and_its_exercises_are_open(folder):
    kept = nbformat.read(folder / f"{folder.name}.ipynb", as_version=4)
    ran = execute(with_solutions(nbformat.from_dict(kept), folder), folder)
    own = [cell for cell in ran.cells if not tagged(cell, "added")]
    for number, (before, after) in enumerate(zip(kept.cells, own, strict=True)):
        if before.cell_type == "code":
            assert before.execution_count, f"cell {number} is kept without having been run"
            assert without_numbers(text_of(before)) == without_numbers(text_of(after)), f"cell {number} is out of date"
    checks = [cell for cell in own if tagged(cell, "check")]
    solved = [cell for cell in ran.cells if tagged(cell, "added")][1::2]
    assert len(checks) >= 2
    for number, (open_one, solved_one) in enumerate(zip(checks, solved, strict=True), start=1):
        assert text_of(open_one).startswith(f"exercise {number}: not yet"), text_of(open_one)
        assert text_of(solved_one) == f"exercise {number}: right\n", text_of(solved_one)


def heads_and_rows(text: str) -> tuple[list[str], list[str]]:
    """The heads of the tables in a text, and the first cell of each other line."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    below = [number for number, line in enumerate(lines) if line.startswith("|---")]
    rows = [n for n in range(len(lines)) if n not in below and n + 1 not in below]
    return [lines[n - 1] for n in below], [lines[n].split("|")[1].strip() for n in rows]


@pytest.mark.slow
@pytest.mark.usefixtures("fast_processes")
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_script_runs_and_prints_the_heads_and_rows_of_its_readmes_table(folder):
    ran = subprocess.run(
        [sys.executable, "-m", f"llm_tricks.{folder.name}.run"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    names = ("results.json", "results_long.json")  # where there is no short table, the printed one has fewer rows
    kept = next(filter(None, (table_in(folder / "README.md", name) for name in names)))
    heads, rows, printed_heads, printed_rows = (part for text in (kept, ran.stdout) for part in heads_and_rows(text))
    assert heads and heads == printed_heads
    if (folder / "results.json").exists():
        assert printed_rows == rows
    assert printed_rows and set(printed_rows) <= set(rows)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_figures_of_a_readme_are_those_of_the_kept_results(folder):
    script, readme = runpy.run_path(str(folder / "run.py")), (folder / "README.md").read_text()
    kept = sorted(folder.glob("results*.json"))
    assert kept
    for file in kept:
        results = json.loads(file.read_text())
        assert results["seeds"] and results["versions"]["torch"]
        assert results["command"] in readme, "the command that makes the figures stands beside them"
        table = table_in(folder / "README.md", file.name)
        assert table == with_origin(script["table"], results)
        origin = table.splitlines()[-1]
        assert origin.startswith(f"Seeds {', '.join(map(str, results['seeds']))}; torch {results['versions']['torch']}")
        assert f"]({file.stem}.png)" in readme and file.with_suffix(".png").is_file()
        assert script["figure"](results).axes


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_readme_has_its_parts_and_what_it_points_to_is_there(folder):
    text = (folder / "README.md").read_text()
    for part in ("## The problem", "## The formulas", "## What came out", "## In this framework", "## References"):
        assert part in text, part
    assert "## 中文摘要" in text and "arXiv" in text
    pointers = re.findall(r"^- \[`([^`]+)`\]\(\.\./\.\./[^)]+\): `([^`]+)`", text, flags=re.MULTILINE)
    assert pointers, "which line of the framework does the same"
    for file, line in pointers:
        assert (ROOT / file).read_text().count(line) == 1, f"{line!r} is to be one place of {file}"
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (folder / target).exists(), target
    for command in re.findall(r"^python (.+?)(?:\s+#.*)?$", text, flags=re.MULTILINE):
        words = shlex.split(command)
        assert words[:2] in (["-m", f"llm_tricks.{folder.name}.run"], ["-m", "llm_tricks.notebook"]), command


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_notebook_reads_in_small_steps(folder):
    cells = nbformat.read(folder / f"{folder.name}.ipynb", as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert all(len(cell.source.splitlines()) <= LONGEST_CELL for cell in code)
    assert "中文摘要" in cells[0].source
    assert not any("/root/" in text_of(cell) or "/tmp/" in text_of(cell) for cell in code), "paths of a machine"


def test_every_trick_is_in_the_index_and_has_a_notebook():
    assert set(notebooks()) == {folder.name for folder in FOLDERS}
    for page in (HERE / "README.md", ROOT / "README.md", ROOT / "README_zh.md"):
        text = page.read_text()
        for folder in FOLDERS:
            assert f"{folder.name}/" in text, f"{page} says nothing of {folder.name}"


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """Runs a small experiment of a trick whose README has a table for the short form only; exit code and stderr."""
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "README.md").write_text("<!-- table: results.json -->\n\nold\n\n<!-- end of table -->\n")

    def run(*flags, experiment=lambda seeds, long: {"runs": seeds}):
        def figure(results):
            import matplotlib.pyplot as plt

            return plt.figure()

        monkeypatch.setattr(sys, "argv", ["run.py", *flags])
        try:
            run_experiment(str(tmp_path / "small" / "run.py"), "", experiment, lambda results: "| a |", figure)
        except SystemExit as end:
            return end.code, capsys.readouterr().err
        return 0, (tmp_path / "small")

    return run


def must_not_run(seeds, long):
    raise AssertionError("the flags are wrong")


@pytest.mark.parametrize("wrong", ["-1", "2147483648", "3 3"])
def test_wrong_seeds_are_refused_before_the_experiment(script, wrong):
    code, said = script("--seeds", "7", *wrong.split(), experiment=must_not_run)
    assert code == 2 and f"--seeds {wrong.split()[0]}: allowed are whole numbers from 0 to 2147483647" in said


def test_results_without_a_place_in_the_readme_are_refused_before_the_experiment(script):
    code, said = script("--long", "--write", experiment=must_not_run)
    assert code == 2 and "README.md has no table for results_long.json; here --write goes without --long" in said
    assert script("--long")[0] == 0


def test_a_missing_file_is_one_message(script):
    def experiment(seeds, long):
        return json.loads(Path("no/such/lengths.json").read_text())

    code, said = script(experiment=experiment)
    assert code == 2 and "no/such/lengths.json" in said and "Traceback" not in said


def test_kept_results_say_their_seeds_and_packages(script):
    for flags, command in (([], "--write"), (["--seeds", "5", "4"], "--write --seeds 5 4")):
        code, folder = script("--write", *flags)
        results = json.loads((folder / "results.json").read_text())
        assert code == 0 and results["command"] == f"python -m llm_tricks.small.run {command}"
        assert {"torch", "transformers", "peft", "trl", "datasets", "scikit-learn"} == set(results["versions"])
        kept = table_in(folder / "README.md", "results.json").splitlines()
        seeds = ", ".join(map(str, results["seeds"]))
        assert kept[0] == "| a |" and kept[-1].startswith(f"Seeds {seeds}; torch {results['versions']['torch']}, ")
