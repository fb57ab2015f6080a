"""Plots a run's metrics over its steps, and compares several runs in one picture."""

import math
from pathlib import Path

from utils.storage.files import replace_file

# the panels, drawn if a run logs the metric: metric → (title, unit, height in inches); `loss/` is a metric by source
_PANELS = {
    "loss": ("Loss", "nats per trained token", 3.2),
    "loss/": ("Loss by source, of the evaluation dashed", "", 2.6),
    "rewards/margins": ("Reward margin, chosen over rejected", "β · log-ratio", 2.0),
    "rewards/accuracies": ("Pairs whose chosen answer has the higher reward", "share", 2.0),
    "learning_rate": ("Learning rate", "", 1.1),
}
_TRAINING, _EVALUATION, _BAD = "#0072b2", "#d55e00", "#cc0000"  # distinguishable for the colour-blind
_GREY = "#555555"
_RUNS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a5195", "#8c6d31", "#56b4e9", "#444444")
_STYLES = ("-", "-.", ":")  # "--" is the evaluation's
_DOTS_UNTIL = 30  # up to this many points get a marker
_MOST_SOURCES = 12  # more lines in one panel are not distinguishable
_POINTS = 4000  # more are not distinguishable at this width
_LOG_FROM = 500  # a loss that falls by this factor looks flat on a linear scale


def series(history: list[dict], name: str) -> tuple[list[int], list[float]]:
    """A metric's steps and values; of a step that was logged before and after a resume, the last value.

    `series([{"step": 1, "loss": 2.5}, {"step": 1, "eval_loss": 3.0}], "loss")` → `([1], [2.5])`
    """
    found = {}
    for entry in history:
        if isinstance(entry.get(name), int | float) and "step" in entry:
            found[entry["step"]] = float(entry[name])
    steps = sorted(found)
    return steps, [found[step] for step in steps]


def sources_of(history: list[dict], prefix: str = "loss/") -> list[str]:
    """The sources whose losses a run logs, in the order of their first values.

    `sources_of([{"step": 1, "loss/maths": 2.5, "eval_loss/code": 3.0}])` → `["maths"]`
    """
    names = dict.fromkeys(name for entry in history for name in entry if name.startswith(prefix))
    return [name.removeprefix(prefix) for name in names]


def smoothed(values: list[float], weight: float) -> list[float]:
    """The exponential moving average with Adam's bias correction.

    `smoothed([1.0, 3.0], 0.5)` → `[1.0, 2.333…]`. Values that are not finite are skipped.

    Args:
        values: in the order of the steps.
        weight: of the previous average, in [0, 1); 0 returns the values unchanged.
    """
    average, seen, result = 0.0, 0, []
    for value in values:
        if math.isfinite(value):
            average, seen = weight * average + (1 - weight) * value, seen + 1
        result.append(average / (1 - weight**seen) if seen else math.nan)
    return result


def smoothing_for(points: int) -> float:
    """The weight of an average over about a twentieth of the points; 0 for fewer than 25."""
    return 0.0 if points < 25 else round(min(0.99, 1 - 20 / points), 2)


def plot_history(history: list[dict], path: Path, planned: int | None = None, smooth: float | None = None) -> None:
    """Plots a run: training loss raw and smoothed, evaluation, learning rate; for DPO margins and accuracies.

    On a logarithmic scale the logarithm is smoothed, since an average of a fast falling loss lies far above its curve.

    Args:
        history: the trainer's log, an entry for each line.
        path: the PNG file, replaced atomically.
        planned: the run's planned steps; the title says if it stopped before them.
        smooth: the weight of the moving average; None for `smoothing_for`.
    """
    last = max((entry.get("step", 0) for entry in history), default=0)
    stopped = f", stopped at step {last:,} of {planned:,}" if planned and last < planned else ""
    figure, panels = _panels([history], stopped)
    for name, axes in panels.items():
        if name == "learning_rate":
            _draw_rate(axes, *series(history, name), _GREY)
            continue
        if name == "loss/":
            _draw_sources(axes, history, smooth)
            continue
        _set_scale(axes, [history], name)
        _draw_training(axes, *series(history, name), smooth, _TRAINING)
        _draw_evaluation(axes, *series(history, f"eval_{name}"), _EVALUATION, "evaluation")
        _finish_panel(axes, name)
    _save(figure, panels, path)


def _draw_sources(axes, history: list[dict], smooth) -> None:
    """Draws the losses of each source in a colour of its own, the evaluation's dashed."""
    sources = list(dict.fromkeys(sources_of(history) + sources_of(history, "eval_loss/")))
    if len(sources) > _MOST_SOURCES:
        axes.set_title(f"Loss of the first {_MOST_SOURCES} of {len(sources)} sources", loc="left", fontsize=11)
    for number, source in enumerate(sources[:_MOST_SOURCES]):
        colour, style = _RUNS[number % len(_RUNS)], _STYLES[number // len(_RUNS) % len(_STYLES)]
        training, evaluation = series(history, f"loss/{source}"), series(history, f"eval_loss/{source}")
        _draw_training(axes, *training, smooth, colour, style, source)
        _draw_evaluation(axes, *evaluation, colour, None if training[0] else source)
    _finish_panel(axes, "loss/")


def plot_runs(runs: dict[str, list[dict]], path: Path, smooth: float | None = None) -> None:
    """Plots several runs in one picture, a colour each: training smoothed and, pale, raw; evaluation dashed.

    Args:
        runs: label → the trainer's log.
        path: as in `plot_history`.
        smooth: the weight of the moving average, the same for all; None for `smoothing_for` of the longest history.
    """
    if smooth is None:
        smooth = smoothing_for(max(len(series(history, "loss")[0]) for history in runs.values()))
    figure, panels = _panels(list(runs.values()))
    for name, axes in panels.items():
        _set_scale(axes, list(runs.values()), name)
        for number, (label, history) in enumerate(runs.items()):
            colour = _RUNS[number % len(_RUNS)]
            style = _STYLES[number // len(_RUNS) % len(_STYLES)]
            if name == "learning_rate":
                _draw_rate(axes, *series(history, name), colour, style)
                continue
            _draw_training(axes, *series(history, name), smooth, colour, style, label)
            _draw_evaluation(axes, *series(history, f"eval_{name}"), colour, None)
        if name != "learning_rate":
            _finish_panel(axes, name, _kinds(runs.values()) if name == "loss" else {}, outside=len(runs) > 3)
    _save(figure, panels, path)


def _panels(histories: list[list[dict]], stopped: str = ""):
    """The figure, and the axes of each panel whose metric is in one of the histories."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    entries = [entry for history in histories for entry in history]
    names = [name for name in _PANELS if name == "loss" or any(name in entry for entry in entries)]
    if len(histories) == 1 and (sources_of(entries) or sources_of(entries, "eval_loss/")):
        names.insert(1, "loss/")
    heights = [_PANELS[name][2] for name in names]
    figure, rows = pyplot.subplots(
        len(names), figsize=(8, sum(heights) + 0.6), layout="constrained", sharex=True, squeeze=False,
        height_ratios=heights,
    )  # fmt: skip
    for name, axes in zip(names, rows[:, 0], strict=True):
        title, unit, _ = _PANELS[name]
        axes.set_title(title + stopped * (name == "loss"), loc="left", fontsize=11, weight="bold")
        axes.set_ylabel(_unit_of_loss(histories) if name.startswith("loss") else unit, fontsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=10)
    rows[-1, 0].set_xlabel("step", fontsize=10)
    rows[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, dict(zip(names, rows[:, 0], strict=True))


def _unit_of_loss(histories: list[list[dict]]) -> str:
    pairs = {any("rewards/margins" in entry for entry in history) for history in histories if history}
    if len(pairs) > 1:
        return "nats per trained token (SFT)\nor pair (DPO)"
    return "nats per pair" if True in pairs else _PANELS["loss"][1]


def _kinds(histories) -> dict:
    """Legend entries for the line styles of several runs: label → line."""
    from matplotlib.lines import Line2D

    styles = {"training": ("loss", "-"), "evaluation": ("eval_loss", "--")}
    return {
        label: Line2D([], [], color=_GREY, linestyle=style)
        for label, (name, style) in styles.items()
        if any(series(history, name)[0] for history in histories)
    }


def _set_scale(axes, histories: list[list[dict]], name: str) -> None:
    """Sets a panel's scale; called before smoothing, which depends on it."""
    drawn = [series(history, kind)[1] for history in histories for kind in (name, f"eval_{name}")]
    drawn = [value for values in drawn for value in values if math.isfinite(value)]
    if name == "loss" and drawn and min(drawn) > 0 and max(drawn) / min(drawn) > _LOG_FROM:
        axes.set_yscale("log")
        axes.set_ylabel(f"{axes.get_ylabel()}, log scale")
    if name == "rewards/accuracies" and drawn:
        axes.set_ylim(min(0.0, *drawn), 1.03)


def _draw_training(axes, steps, values, smooth, colour, style="-", label=None) -> None:
    """Draws the raw curve and, if it has enough points, its moving average; `label` names one of several runs."""
    weight = smoothing_for(len(values)) if smooth is None else smooth
    shown, finite = _finite(steps, values)
    raw = {"label": label or f"training, {finite[-1]:.4g} at last"} if finite else {}
    dots = {"marker": "o", "markersize": 3.5} if len(finite) <= _DOTS_UNTIL else {}
    if weight and finite:
        axes.plot(*_thin(shown, finite), color=colour, alpha=0.4, linewidth=1, **({} if label else raw))
        steady = {"label": f"{label}, " * bool(label) + f"moving average (weight {weight:g})", "linestyle": style}
        log = axes.get_yscale() == "log"
        average = [math.exp(v) for v in smoothed(map(math.log, finite), weight)] if log else smoothed(finite, weight)
        axes.plot(*_thin(shown, average), color=colour, linewidth=2, **steady)
    elif finite:
        axes.plot(*_thin(shown, finite), color=colour, linewidth=1.5, linestyle=style, **raw, **dots)
    bad = [step for step, value in zip(steps, values, strict=True) if not math.isfinite(value)]
    if bad:
        axes.plot(bad, [0.96] * len(bad), "x", color=_BAD, transform=axes.get_xaxis_transform(), label="not finite")


def _draw_rate(axes, steps, values, colour, style="-") -> None:
    shown, finite = _finite(steps, values)
    dot = {"marker": "o", "markersize": 3.5} if len(finite) < 3 else {}
    axes.plot(*_thin(shown, finite), color=colour, linewidth=1.5, linestyle=style, **dot)


def _draw_evaluation(axes, steps, values, colour, label) -> None:
    shown, finite = _finite(steps, values)
    if not finite:
        return
    marker = {"marker": "o", "markersize": 5} if len(finite) <= 2 * _DOTS_UNTIL else {}
    if label:
        label += f", {finite[-1]:.4g} at last"
    line = {"linewidth": 1.2, "linestyle": "--", "markeredgecolor": "white"}
    axes.plot(*_thin(shown, finite), color=colour, label=label, **marker, **line)


def _finish_panel(axes, name: str, more: dict | None = None, outside: bool = False) -> None:
    """Adds a legend; `more` are entries besides the curves, `outside` puts it below the figure."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    # two runs may have the same label
    once = [*dict(zip(labels, handles, strict=True)).items(), *(more or {}).items()]
    labels, handles = zip(*once, strict=True)
    if outside:
        # many runs would cover the curves
        if name == "loss":
            axes.figure.set_figheight(axes.figure.get_figheight() + 0.25 * len(once))
            axes.figure.legend(handles, labels, loc="outside lower center", fontsize=9, frameon=False)
        return
    axes.legend(
        handles, labels, loc="upper right" if name.startswith("loss") else "lower right", fontsize=9, framealpha=0.7
    )


def _finite(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    kept = [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
    return [step for step, _ in kept], [value for _, value in kept]


def _thin(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    """Keeps the lowest and highest point of each stretch of a long history, so that no spike is lost."""
    if len(steps) <= _POINTS:
        return steps, values
    stretch = math.ceil(2 * len(steps) / _POINTS)
    places = []
    for start in range(0, len(steps), stretch):
        part = range(start, min(start + stretch, len(steps)))
        places += sorted({min(part, key=values.__getitem__), max(part, key=values.__getitem__)})
    return [steps[place] for place in places], [values[place] for place in places]


def _save(figure, panels: dict, path: Path) -> None:
    """Writes the picture atomically, so that a full disk leaves no partial file."""
    from matplotlib import pyplot

    try:
        with replace_file(path) as part:
            figure.savefig(part, dpi=150, format="png")
    finally:
        pyplot.close(figure)
