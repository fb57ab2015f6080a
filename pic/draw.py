"""Draws the pictures of the README.

python -m pic.draw                         # pic/architecture.png, from the packages of utils/
python -m pic.draw --run output/sft-…      # and pic/loss.png, from that run
"""

import argparse
import ast
import json
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.patches import FancyBboxPatch  # noqa: E402

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PICTURE = HERE / "architecture.png"
COLOURS = ("#ececec", "#e2f0d9", "#dbe9f6", "#fbe5d6", "#fff2cc", "#ede7f6")
WIDTH, GAP = 11.0, 0.1  # inches
CHARACTERS = 12  # of a description, in an inch


class Package(NamedTuple):
    """A box of the picture.

    Attributes:
        name: the package, or module, in `utils/`.
        does: the first sentence of its docstring.
    """

    name: str
    does: str


def docstring(file: Path) -> str:
    """A file's docstring, without importing it."""
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""


def first_sentence(text: str) -> str:
    """`"Files and folders: hashes, weights.\\n\\nIn reading order: …"` → `"Files and folders: hashes, weights"`"""
    return re.split(r"\.(?:\s|$)", text.partition("\n\n")[0], maxsplit=1)[0].replace("\n", " ")


def layers() -> list[list[Package]]:
    """The packages as `utils/__init__.py` lists them: a layer a line, the lowest first.

    Raises:
        ValueError: a package that the list lacks, or one that is listed and not there.
    """
    utils = ROOT / "utils"
    listed = re.findall(r"^(\w+(?:, \w+)*)  ", docstring(utils / "__init__.py"), re.MULTILINE)
    names = [line.split(", ") for line in listed]
    found = {file.parent.name for file in utils.glob("*/__init__.py")} | {
        file.stem for file in utils.glob("*.py") if file.stem != "__init__"
    }
    if different := found ^ {name for line in names for name in line}:
        raise ValueError(f"utils/__init__.py does not list the packages there are: {', '.join(sorted(different))}")

    def describe(name: str) -> Package:
        file = utils / f"{name}.py" if (utils / f"{name}.py").exists() else utils / name / "__init__.py"
        return Package(file.name if file.stem == name else name, first_sentence(docstring(file)))

    return [[describe(name) for name in line] for line in names]


def draw_architecture(path: Path) -> None:
    """Draws the layers, each upon those it may import from, and keeps what was drawn in the picture's metadata."""
    drawn = layers()
    steps = "arguments → template and tokenizer → datasets → model and adapter → trainer → saved run"
    walls = [*drawn, [Package("main_train.py", steps)]]
    heights = [0.5 if len(packages) == 1 else 0.8 for packages in walls]
    tall = sum(heights) + GAP * len(walls)
    figure = pyplot.figure(figsize=(WIDTH + 0.75, tall + 0.1))
    axes = figure.add_axes((0, 0, 1, 1))
    bottom = 0.0
    for number, (packages, height) in enumerate(zip(walls, heights, strict=True)):
        width = (WIDTH - GAP * (len(packages) - 1)) / len(packages)
        for place, package in enumerate(packages):
            colour = COLOURS[number % len(COLOURS)]
            _draw_box(axes, (place * (width + GAP), bottom), (width, height), package, colour)
        bottom += height + GAP
    arrow = {"arrowstyle": "-|>", "color": "#555555", "linewidth": 1.4}
    axes.annotate("", xy=(-0.3, 0), xytext=(-0.3, tall - GAP), arrowprops=arrow)
    axes.text(-0.5, tall / 2, "imports only from below", rotation=90, ha="center", va="center", fontsize=11)
    axes.set_xlim(-0.7, WIDTH + 0.05)
    axes.set_ylim(-0.1, tall)
    axes.axis("off")
    figure.savefig(path, dpi=100, metadata={"Description": json.dumps(drawn)})
    pyplot.close(figure)


def _draw_box(axes, corner: tuple[float, float], size: tuple[float, float], package: Package, colour: str) -> None:
    style = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch(corner, *size, boxstyle=style, facecolor=colour, edgecolor="#555555"))
    middle, top = corner[0] + size[0] / 2, corner[1] + size[1]
    lines = textwrap.wrap(package.does.replace("`", ""), int(size[0] * CHARACTERS))
    axes.text(middle, top - 0.16, package.name, ha="center", va="center", fontsize=12, weight="bold")
    below = corner[1] + (size[1] - 0.27) / 2
    axes.text(middle, below, "\n".join(lines), ha="center", va="center", fontsize=9, linespacing=1.1)


def drawn_in(path: Path) -> list[list[Package]]:
    """The layers that a picture shows, from its metadata."""
    from PIL import Image

    with Image.open(path) as picture:
        return [[Package(*package) for package in line] for line in json.loads(picture.text["Description"])]


def draw_loss(run: Path, path: Path) -> None:
    """Draws a run's losses with the project's own plot."""
    from utils.run.plot import plot_history

    plot_history(json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"], path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a finished run, whose loss is drawn")
    args = parser.parse_args()
    draw_architecture(PICTURE)
    if args.run:
        draw_loss(args.run, HERE / "loss.png")


if __name__ == "__main__":
    main()
