"""The picture of a run: its figures over the steps."""

from pathlib import Path

# what is drawn, one panel each, where the run has it: figure → (title, unit)
_PANELS = {
    "loss": ("Loss", "nats per trained token"),
    "rewards/margins": ("Reward margin, chosen over rejected", "β · log-ratio"),
    "rewards/accuracies": ("Pairs whose chosen answer has the higher reward", "share"),
}


def plot_history(history: list[dict], path: Path) -> None:
    """Draws training and evaluation figures over the steps.

    Args:
        history: the trainer's log, an entry for each line.
        path: the PNG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {name: text for name, text in _PANELS.items() if name == "loss" or any(name in entry for entry in history)}
    figure, rows = pyplot.subplots(
        len(panels), figsize=(8, 1.5 + 3 * len(panels)), layout="constrained", sharex=True, squeeze=False
    )
    for axes, (name, (title, unit)) in zip(rows[:, 0], panels.items(), strict=True):
        for key, label in ((name, "training"), (f"eval_{name}", "evaluation")):
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
        axes.set(ylabel=unit if len(panels) == 1 or name != "loss" else "nats per pair", title=title)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    rows[-1, 0].set(xlabel="step")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
