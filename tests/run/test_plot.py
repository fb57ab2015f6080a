"""The pictures: what is drawn, for which histories, and also for runs that stop early."""

import errno
import json
import math
import os
import signal
import types
from pathlib import Path

import pytest
import tiny
from conftest import write_rows

import main_train
import utils.run.plot
import utils.run.save
from utils.run.ledger_rows import read_run_ledger
from utils.run.plot import plot_history, plot_runs, series, smoothed, smoothing_for
from utils.runtime.errors import Interrupted, UserError
from utils.train.checkpointing import CompleteCheckpointMixin

PNG = b"\x89PNG"


def history_of(steps: int, **more) -> list[dict]:
    found = [{"step": s, "loss": 1.0 + 1 / s, "learning_rate": 1e-3 / s, **more} for s in range(1, steps + 1)]
    return found + [{"step": s, "eval_loss": 1.5} for s in range(1, steps + 1, 10)]


@pytest.fixture
def drawn(monkeypatch):
    """What was drawn last: panel → axes."""
    kept = {}
    save = utils.run.plot._save

    def keep(figure, panels, path):
        kept.clear()
        kept.update(panels)
        figure.canvas.draw()  # the layout is made here, and may complain
        save(figure, panels, path)

    monkeypatch.setattr(utils.run.plot, "_save", keep)
    return kept


def labels_of(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


# ---------------------------------------------------------------------- figures
def test_the_moving_average_is_the_weighted_mean_of_what_was_seen():
    values, weight = [3.0, 1.0, 4.0, 1.0, 5.0], 0.7
    for end in range(1, len(values) + 1):
        weights = [weight ** (end - 1 - place) for place in range(end)]
        mean = sum(w * v for w, v in zip(weights, values, strict=False)) / sum(weights)
        assert smoothed(values, weight)[end - 1] == pytest.approx(mean, rel=1e-12)
    assert smoothed(values, 0.0) == values


def test_values_that_are_none_are_passed_over():
    assert smoothed([2.0, math.nan, math.inf, 2.0], 0.5) == pytest.approx([2.0] * 4)
    assert math.isnan(smoothed([math.nan, 1.0], 0.5)[0])


def test_a_step_that_was_logged_twice_counts_once():
    history = [
        {"step": 2, "loss": 5.0},
        {"step": 1, "loss": 6.0},
        {"step": 2, "loss": 4.0},
        {"step": 2, "eval_loss": 9},
    ]
    assert series(history, "loss") == ([1, 2], [6.0, 4.0])


def test_few_points_are_not_smoothed():
    assert smoothing_for(3) == 0.0 < smoothing_for(50) < smoothing_for(5000) < 1


# ---------------------------------------------------------------------- a run's picture
def test_raw_smoothed_evaluation_and_learning_rate(drawn, tmp_path):
    plot_history(history_of(60), tmp_path / "loss.png", planned=60)
    assert list(drawn) == ["loss", "learning_rate"]
    raw, steady, evaluation = drawn["loss"].lines
    assert raw.get_alpha() < 0.5 and raw.get_linewidth() < steady.get_linewidth()
    assert list(raw.get_ydata()) == [1.0 + 1 / s for s in range(1, 61)]
    assert list(steady.get_ydata()) == smoothed(list(raw.get_ydata()), smoothing_for(60))
    assert list(evaluation.get_xdata()) == list(range(1, 61, 10))
    assert labels_of(drawn["loss"]) == [
        "training, 1.017 at last", f"moving average (weight {smoothing_for(60):g})", "evaluation, 1.5 at last",
    ]  # fmt: skip
    assert "stopped" not in drawn["loss"].get_title("left")
    assert list(drawn["learning_rate"].lines[0].get_ydata())[:2] == [1e-3, 5e-4]


def test_sources_have_a_panel_with_a_colour_each(drawn, tmp_path):
    history = [{**entry, "loss/a": 2.0, "loss/b": 3.0} for entry in history_of(10)]
    history += [{"step": 5, "eval_loss": 1.0, "eval_loss/b": 1.5, "eval_loss/only held out": 2.5}]
    plot_history(history, tmp_path / "loss.png")
    assert list(drawn) == ["loss", "loss/", "learning_rate"]
    axes = drawn["loss/"]
    assert labels_of(axes) == ["a", "b", "only held out, 2.5 at last"]
    a, b, held_b, held = axes.lines
    assert [set(line.get_ydata()) for line in axes.lines] == [{2.0}, {3.0}, {1.5}, {2.5}]
    assert b.get_color() == held_b.get_color() and len({line.get_color() for line in axes.lines}) == 3
    assert [line.get_linestyle() for line in (a, b, held_b, held)] == ["-", "-", "--", "--"]
    assert axes.get_ylabel() == drawn["loss"].get_ylabel()


def test_of_many_sources_the_first_are_drawn_and_the_title_says_so(drawn, tmp_path):
    history = [{"step": 1, "loss": 1.0, **{f"loss/{number}": number + 1 for number in range(40)}}]
    plot_history(history, tmp_path / "loss.png")
    assert len(drawn["loss/"].lines) == 12
    assert drawn["loss/"].get_title(loc="left") == "Loss of the first 12 of 40 sources"


def test_preferences_show_margins_and_accuracies(drawn, tmp_path):
    plot_history(history_of(5, **{"rewards/margins": 0.5, "rewards/accuracies": 1.0}), tmp_path / "loss.png")
    assert list(drawn) == ["loss", "rewards/margins", "rewards/accuracies", "learning_rate"]
    assert drawn["loss"].get_ylabel() == "nats per pair"


def test_a_run_that_stopped_says_where(drawn, tmp_path):
    plot_history(history_of(3), tmp_path / "loss.png", planned=40)
    assert drawn["loss"].get_title("left") == "Loss, stopped at step 3 of 40"


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 100_000])
def test_histories_of_every_length(drawn, tmp_path, steps):
    history = history_of(steps)
    if steps > 100:
        history[50_017]["loss"] = 9.0
    plot_history(history, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes()[:4] == PNG
    if steps:
        assert max(drawn["loss"].lines[0].get_ydata()) == (9.0 if steps > 100 else 2.0)  # no spike is lost
        assert len(drawn["loss"].lines[0].get_xdata()) <= 4000


def test_entries_that_are_not_finite_are_marked_and_spare_the_rest(drawn, tmp_path):
    history = history_of(40)
    history[3]["loss"], history[7]["loss"], history[0]["learning_rate"] = math.nan, math.inf, math.nan
    plot_history(history + [{"step": 40, "eval_loss": math.inf}], tmp_path / "loss.png")
    marks = next(line for line in drawn["loss"].lines if line.get_marker() == "x")
    assert list(marks.get_xdata()) == [4, 8] and "not finite" in labels_of(drawn["loss"])
    assert all(math.isfinite(value) for line in drawn["loss"].lines for value in line.get_ydata())
    plot_history([{"step": 1, "loss": math.nan, "eval_loss": math.nan}], tmp_path / "loss.png")


def test_a_loss_that_falls_far_is_drawn_on_a_logarithmic_scale(drawn, tmp_path):
    plot_history([{"step": s, "loss": 5 * 0.1**s} for s in range(5)], tmp_path / "loss.png")
    assert drawn["loss"].get_yscale() == "log" and "log scale" in drawn["loss"].get_ylabel()
    assert labels_of(drawn["loss"]) == ["training, 0.0005 at last"]
    plot_history([{"step": s, "loss": s - 2.0} for s in range(5)], tmp_path / "loss.png")
    assert drawn["loss"].get_yscale() == "linear"


def test_on_a_logarithmic_scale_the_average_is_the_logarithms(drawn, tmp_path):
    """Of a loss that falls by the same factor with each step it runs along the curve, not far above it."""
    falling = [{"step": s, "loss": 5 * 0.9**s} for s in range(100)]
    plot_history(falling, tmp_path / "loss.png")
    raw, steady = drawn["loss"].lines
    wanted = [math.exp(value) for value in smoothed([math.log(y) for y in raw.get_ydata()], smoothing_for(100))]
    assert drawn["loss"].get_yscale() == "log" and list(steady.get_ydata()) == pytest.approx(wanted, rel=1e-12)
    # the evaluation decides on the scale too, and for every run of a picture the same holds
    flat = [{"step": s, "loss": 5.0 + s % 2} for s in range(100)]
    plot_runs({"a": flat, "b": [*flat, {"step": 9, "eval_loss": 1e-3}]}, tmp_path / "compare.png", smooth=0.5)
    values = [math.log(5.0 + s % 2) for s in range(100)]
    found = [line for line in drawn["loss"].lines if line.get_label().startswith(("a,", "b,"))]
    for line in found:
        assert list(line.get_ydata()) == pytest.approx([math.exp(value) for value in smoothed(values, 0.5)])
    assert len(found) == 2


def test_readable_at_the_width_of_a_readme(rendered, drawn, tmp_path):
    import matplotlib.image

    plot_history(history_of(60), tmp_path / "loss.png")
    height, width = matplotlib.image.imread(tmp_path / "loss.png").shape[:2]
    assert 800 <= width <= 1600 and height < width
    axes = drawn["loss"]
    texts = [*axes.get_xticklabels(), *axes.get_yticklabels(), axes.yaxis.label, *axes.get_legend().get_texts()]
    for text in texts:
        assert text.get_fontsize() / 72 * 100 >= 12  # pixels, at 800 for 8 inches


def test_a_picture_is_whole_or_not_there(rendered, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    plot_history(history_of(3), tmp_path / "loss.png")
    before = (tmp_path / "loss.png").read_bytes()

    def full(self, path, **options):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError):
        plot_history(history_of(5), tmp_path / "loss.png")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
    assert (tmp_path / "loss.png").read_bytes() == before


def test_several_runs_have_a_colour_each(drawn, tmp_path):
    plot_runs({"a": history_of(60), "b": history_of(3), "c": []}, tmp_path / "compare.png", smooth=0.5)
    labels = labels_of(drawn["loss"])
    assert [label.split(",")[0] for label in labels] == ["a", "b", "training", "evaluation"]
    assert "weight 0.5" in labels[0]
    assert len({line.get_color() for line in drawn["loss"].lines}) == 2
    plot_runs({"long": history_of(60), "short": history_of(30)}, tmp_path / "compare.png")
    runs = labels_of(drawn["loss"])[:2]
    assert all(f"weight {smoothing_for(60):g}" in label for label in runs)  # else they would differ
    plot_runs({str(n): history_of(3) for n in range(20)}, tmp_path / "many.png")
    styles = [(line.get_color(), line.get_linestyle()) for line in drawn["learning_rate"].lines]
    assert len(set(styles)) == 20


def test_the_lines_of_training_and_of_evaluation_are_told_apart_in_grey(drawn, tmp_path):
    bare = [{"step": s, "loss": 1.0} for s in range(1, 4)]
    told = {"training": "-", "evaluation": "--"}
    for runs, wanted in [({"a": history_of(60), "b": bare}, told), ({"a": bare, "b": bare}, {"training": "-"}),
                         ({str(n): history_of(3) for n in range(5)}, told)]:  # fmt: skip
        plot_runs(runs, tmp_path / "compare.png", smooth=0.5)
        axes = drawn["loss"]
        legend = axes.get_legend() or axes.figure.legends[0]
        lines = dict(zip([text.get_text() for text in legend.get_texts()], legend.get_lines(), strict=True))
        grey = {name: line for name, line in lines.items() if name in told}
        assert {name: line.get_linestyle() for name, line in grey.items()} == wanted
        assert {line.get_color() for line in grey.values()} == {"#555555"}
        assert not {line.get_color() for line in axes.lines} & {"#555555"}
        assert len(lines) == len(runs) + len(wanted)
    # no training is drawn in the style of an evaluation, however many runs there are
    plot_runs({str(n): bare for n in range(20)}, tmp_path / "compare.png")
    assert "--" not in {line.get_linestyle() for line in drawn["loss"].lines}


def fits(axes) -> bool:
    """Whether the label is no longer than the axis beside it."""
    axes.figure.draw_without_rendering()
    return axes.yaxis.label.get_window_extent().height <= axes.get_window_extent().height


def test_the_loss_of_tokens_and_of_pairs_has_its_own_unit(drawn, tmp_path):
    tokens, pairs = history_of(3), history_of(3, **{"rewards/margins": 0.5})
    for runs, unit in [
        ([tokens, tokens], "nats per trained token"),
        ([pairs, pairs], "nats per pair"),
        ([pairs, tokens], "nats per trained token (SFT) or pair (DPO)"),
        ([tokens, pairs, []], "nats per trained token (SFT) or pair (DPO)"),
        ([pairs, []], "nats per pair"),
    ]:
        plot_runs({str(n): history for n, history in enumerate(runs)}, tmp_path / "compare.png")
        axes = drawn["loss"]
        assert axes.get_ylabel().replace("\n", " ") == unit
        assert fits(axes)
    low = [{"step": 4, "loss": 1e-4}]
    plot_runs({"a": tokens + low, "b": pairs}, tmp_path / "compare.png")
    assert drawn["loss"].get_ylabel().endswith("or pair (DPO), log scale")
    assert fits(drawn["loss"])


# ---------------------------------------------------------------------- runs that stop early
def stop_in_the_third_step(monkeypatch, how):
    """`how` happens in the third step of the training."""
    from utils.train.trainer import FaultTolerantTrainerMixin

    step = FaultTolerantTrainerMixin.training_step

    def stopped(self, *args, **kwargs):
        if self.state.global_step == 2:
            how(self)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(FaultTolerantTrainerMixin, "training_step", stopped)


def fail(error):
    def how(trainer):
        raise error

    return how


STOPS = {
    "an error": (fail(RuntimeError("the original one")), RuntimeError, "the original one"),
    "Ctrl-C twice": (fail(KeyboardInterrupt()), KeyboardInterrupt, "No checkpoint is saved yet"),
    "a full disk": (fail(UserError("no room")), UserError, "no room"),
    "SIGTERM": (lambda trainer: os.kill(os.getpid(), signal.SIGTERM), Interrupted, "stopped after step 3"),
    "no number": (lambda trainer: setattr(trainer, "_bad_sources", [1]), UserError, "the loss is"),
}


@pytest.mark.parametrize("name", STOPS)
def test_a_run_that_stops_early_is_drawn(train, tmp_path, monkeypatch, name):
    how, error, said = STOPS[name]
    stop_in_the_third_step(monkeypatch, how)
    with pytest.raises(error, match=said):
        train("--logging_steps", "1", "--row_ledger", "true")
    folder = tmp_path / "run"
    steps = read_run_ledger(str(folder)).note.step
    assert steps == (3 if name == "SIGTERM" else 2)
    state = json.loads((folder / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry][:2] == [1, 2]
    assert (folder / "loss.png").read_bytes()[:4] == PNG
    assert (folder / "train_args.json.part").exists() and not (folder / "train_args.json").exists()


def test_a_failure_to_draw_hides_no_error_and_costs_no_run(train, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(utils.run.save, "plot_history", fail(OSError(errno.ENOSPC, "No space left on device")))
    folder = train(output="whole")
    assert (folder / "train_args.json").exists() and (folder / "adapter_model.safetensors").exists()
    assert "cannot be written or plotted" in capsys.readouterr().err
    stop_in_the_third_step(monkeypatch, fail(RuntimeError("the original one")))
    with pytest.raises(RuntimeError, match="the original one"):
        train()


def test_only_the_first_process_draws(tmp_path, monkeypatch):
    write = lambda path: Path(path).write_text("{}")  # noqa: E731
    state = types.SimpleNamespace(log_history=history_of(3), max_steps=3, save_to_json=write)
    trainer = CompleteCheckpointMixin()
    trainer.state, trainer.args = state, types.SimpleNamespace(output_dir=str(tmp_path))
    monkeypatch.setenv("RANK", "1")
    with utils.run.save.save_history_on_exit(trainer):
        pass
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("RANK", "0")
    with utils.run.save.save_history_on_exit(trainer):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "trainer_state.json"]


def test_a_resumed_run_is_drawn_whole(train, drawn):
    flags = ["--logging_steps", "1", "--save_strategy", "epoch"]
    train(*flags, "--max_steps", "2")
    train(*flags, "--resume_from_checkpoint", "true")
    assert list(drawn["loss"].lines[0].get_xdata()) == [1, 2, 3, 4]


# ---------------------------------------------------------------------- other places for the curves
def test_tensorboard_has_the_losses(train, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = [
        write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in (("a", tiny.ROWS[:4]), ("b", tiny.ROWS[4:]))
    ]
    folder = train("--report_to", "tensorboard", "--logging_steps", "1", data=",".join(files))
    (events,) = (folder / "runs").rglob("events.out.tfevents.*")
    curves = EventAccumulator(str(events))
    curves.Reload()
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    for name in ("loss", "loss/a", "loss/b"):
        assert [event.value for event in curves.Scalars(f"train/{name}")] == pytest.approx(series(history, name)[1])


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_what_is_not_installed_is_refused_by_name(refused, tiny_models, tmp_path, name, monkeypatch):
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, f"is_{name}_available", lambda: False)
    data = write_rows(tmp_path / "rows.jsonl", tiny.ROWS)
    flags = ["--model_name_or_path", tiny_models(), "--train_data_path", data, "--output_dir", str(tmp_path / "run")]
    said = refused(main_train.main, *flags, "--report_to", name)
    assert f"--report_to '{name}' needs a package that is not installed" in said and f"pip install {name}" in said
