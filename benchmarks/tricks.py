"""How long each notebook and script of llm_tricks takes.

python -m benchmarks.tricks      # writes benchmarks/tricks.json and the table in llm_tricks/README.md
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.tables import write_table

ROOT = Path(__file__).resolve().parent.parent
INDEX = ROOT / "llm_tricks" / "README.md"


def seconds_of_notebook(path: Path) -> float:
    """Runs a notebook, the start of its Python included, and keeps nothing of it."""
    import nbformat

    from llm_tricks.notebook import execute

    started = time.perf_counter()
    execute(nbformat.read(path, as_version=4), path.parent)
    return time.perf_counter() - started


def seconds_of_script(trick: str) -> float:
    """Runs a trick's script as its README prints it."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        command = [sys.executable, "-m", f"llm_tricks.{trick}.run"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=output, stderr=output)
    return time.perf_counter() - started


def table(results: dict) -> str:
    """The index's table."""
    lines = ["| trick | notebook, seconds | script, seconds |", "|---|---|---|"]
    for run in results["runs"]:
        lines.append(f"| [`{run['trick']}/`]({run['trick']}/) | {run['notebook']:.0f} | {run['script']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()  # for --help
    from llm_tricks.notebook import notebooks

    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "nbclient")}
    results: dict = {"cpu_cores": os.cpu_count(), "versions": versions, "runs": []}
    for trick, path in notebooks().items():
        run = {"trick": trick, "notebook": seconds_of_notebook(path), "script": seconds_of_script(trick)}
        results["runs"].append({key: round(value, 1) if key != "trick" else value for key, value in run.items()})
        print(json.dumps(results["runs"][-1]), flush=True)
    (ROOT / "benchmarks" / "tricks.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    write_table(INDEX, "benchmarks/tricks.json", table(results))


if __name__ == "__main__":
    main()
