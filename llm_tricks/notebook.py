"""The notebooks of this folder: run them in place, and use elsewhere what they define.

python -m llm_tricks.notebook lora_dora moe   # runs these, and keeps what their cells print and draw
python -m llm_tricks.notebook --all
"""

import argparse
import ast
import json
import linecache
import re
import sys
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
CONSTANT = re.compile("[A-Z][A-Z_]{2,}")  # TEST_PART; V and W0 are matrices
INSTALL = "pip install -r llm_tricks/requirements.txt"
SECONDS = 300  # a cell that takes longer hangs


def notebooks() -> dict[str, Path]:
    """Every trick's name and its notebook."""
    return {path.stem: path for path in sorted(HERE.glob("*/*.ipynb"))}


def definitions(trick: str) -> ModuleType:
    """A module of what a notebook defines: its imports, functions, classes and CONSTANTS.

    Nothing else of it runs, and its exercises are left out. Scripts and tests use the notebook's own code this way,
    so that there is no second copy of it.
    """
    path = notebooks()[trick]
    module = ModuleType(f"llm_tricks.{trick}.{trick}")
    sys.modules[module.__name__] = module
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] != "code" or {"exercise", "check"} & set(cell["metadata"].get("tags", [])):
            continue
        name, source = f"{path.name}, cell {number}", "".join(cell["source"])
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # for tracebacks
        kept = [node for node in ast.parse(source).body if _defines(node)]
        exec(compile(ast.Module(kept, type_ignores=[]), name, "exec"), module.__dict__)
    return module


def _defines(node: ast.stmt) -> bool:
    if isinstance(node, ast.Assign):
        return all(
            CONSTANT.fullmatch(name) for target in node.targets for name in ast.unparse(target).strip("()").split(", ")
        )
    return isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef)


def execute(notebook, folder: Path):
    """Runs a notebook's cells in a new Python, in `folder`; returns it with what they print and draw.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    from nbclient import NotebookClient

    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
    )
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            # libraries' remarks about the machine they ran on; a cell that fails raises
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def main(argv: list[str] | None = None) -> int:
    """Runs the notebooks that are named."""
    known = notebooks()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tricks", nargs="*", metavar="trick", help=", ".join(known))
    parser.add_argument("--all", action="store_true", help="every notebook")
    args = parser.parse_args(argv)
    unknown = [trick for trick in args.tricks if trick not in known]
    if unknown or not (args.all or args.tricks):
        parser.error(
            f"{', '.join(map(repr, unknown)) or 'nothing'} names no notebook. Allowed: {', '.join(known)}, or --all"
        )
    try:
        import nbformat
        from nbclient.exceptions import CellExecutionError
    except ModuleNotFoundError as error:
        parser.error(f"{error.name} is missing; {INSTALL}")
    for trick in known if args.all else args.tricks:
        print(f"{trick} ...", flush=True)
        notebook = nbformat.read(known[trick], as_version=4)
        try:
            execute(notebook, known[trick].parent)
        except CellExecutionError as error:
            print(f"{trick}: a cell failed, the notebook is left as it was\n{error}", file=sys.stderr)
            return 1
        notebook.metadata = {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
        unfinished = known[trick].with_suffix(".tmp")
        nbformat.write(notebook, unfinished)
        unfinished.replace(known[trick])
    return 0


if __name__ == "__main__":
    sys.exit(main())
