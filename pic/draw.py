"""Draws the pictures of the README.

python -m pic.draw                         # pic/architecture.png
python -m pic.draw --run output/sft-…      # and pic/loss.png, from that run
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.patches import FancyBboxPatch  # noqa: E402

HERE = Path(__file__).resolve().parent
# column, row, title, file, colour
ROOMS = [
    (0, 0, "arguments", "utils/args.py\ntrain_args/*/base.py", "#dbe9f6"),
    (1, 0, "template", "utils/template/catalogue.py", "#dbe9f6"),
    (1, 1, "tokenizer", "utils/model/tokenizer.py", "#dbe9f6"),
    (2, 0, "files → rows\n→ ids, labels", "utils/data_*.py", "#e2f0d9"),
    (2, 1, "collator", "utils/data/collate.py", "#e2f0d9"),
    (3, 0, "model", "utils/model/load.py", "#fbe5d6"),
    (3, 1, "adapter", "utils/model/adapter.py", "#fbe5d6"),
    (4, 0, "trainer (TRL)", "utils/tasks/*.py", "#fff2cc"),
    (5, 0, "a run's folder", "utils/run/save.py", "#ede7f6"),
    (5, 1, "infer", "utils/script/infer.py", "#ede7f6"),
]
WIDTH, HEIGHT, STEP_X, STEP_Y = 1.75, 0.95, 2.15, 1.3


def corner(column: int, row: int) -> tuple[float, float]:
    """The lower left corner of a room."""
    return column * STEP_X, -row * STEP_Y


def draw_architecture(path: Path) -> None:
    """Draws the rooms in the order data passes through them."""
    figure, axes = pyplot.subplots(figsize=(13, 3.6))
    for column, row, title, file, colour in ROOMS:
        x, y = corner(column, row)
        style = "round,pad=0.02,rounding_size=0.08"
        axes.add_patch(FancyBboxPatch((x, y), WIDTH, HEIGHT, boxstyle=style, facecolor=colour, edgecolor="#555555"))
        axes.text(x + WIDTH / 2, y + 0.68 * HEIGHT, title, ha="center", va="center", fontsize=11, weight="bold")
        axes.text(x + WIDTH / 2, y + 0.24 * HEIGHT, file, ha="center", va="center", fontsize=8, family="monospace")
    arrow = {"arrowstyle": "-|>", "color": "#555555", "linewidth": 1.4}
    for column in range(5):
        x, y = corner(column, 0)
        axes.annotate("", (x + STEP_X, y + HEIGHT / 2), (x + WIDTH, y + HEIGHT / 2), arrowprops=arrow)
    for column in (1, 2, 3, 5):
        x, y = corner(column, 0)
        axes.annotate("", (x + WIDTH / 2, y - STEP_Y + HEIGHT), (x + WIDTH / 2, y), arrowprops=arrow)
    axes.set_title("main_train.py: data flows one way", fontsize=13)
    axes.set_xlim(-0.15, 5 * STEP_X + WIDTH + 0.15)
    axes.set_ylim(-STEP_Y - 0.15, HEIGHT + 0.15)
    axes.axis("off")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def draw_loss(run: Path, path: Path) -> None:
    """Draws a run's losses with the project's own plot."""
    from utils.run.save import plot_history

    plot_history(json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"], path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a finished run, whose loss is drawn")
    args = parser.parse_args()
    draw_architecture(HERE / "architecture.png")
    if args.run:
        draw_loss(args.run, HERE / "loss.png")


if __name__ == "__main__":
    main()
