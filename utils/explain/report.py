"""Formats the preview that utils.script.explain prints."""

from utils.data.mixture import Mixture, format_mixture
from utils.model.source import given_model
from utils.runtime.text import format_count, format_setting

# kind of source → heading of its values, in the order shown
_GROUPS = {
    "flag": "flags",
    "config": "the file of --config",
    "launcher": "the launcher",
    "recipe": "the recipe",
    "default": "defaults in utils/args.py",
    "derived": "derived from other values",
    "library": "the libraries' defaults",
}
_MAX_WIDTH = 48  # of the column of values; a longer value pushes its source to the right


def text_of(explained, everything: bool, diff: dict | None) -> str:
    """The whole preview as text.

    Args:
        explained: from `utils.explain.explain.explain`.
        everything: whether to include values that nobody set.
        diff: from `utils.explain.diff.compare`; None without a run to compare with.
    """
    parts = ["\n".join(plan_lines(explained))]
    parts += value_tables(explained, everything)
    if explained.deepspeed:
        rows = [(key, format_setting(one["value"]), one["from"]) for key, one in explained.deepspeed["values"].items()]
        parts.append("Values of DeepSpeed's file\n" + table(rows))
    parts += no_effect_lines(explained, everything)
    if diff is not None:
        parts.append(diff_text(diff))
    return "\n\n".join(parts)


def plan_lines(explained) -> list[str]:
    """The plan: model, rows, steps, tokens, learning rate, evaluations and checkpoints, one line each."""
    plan, args = explained.plan, explained.args
    rows = [("task", f"{args.task_type}, recipe {args.train_args_path}, --train_mode {args.train_mode}")]
    rows += [
        ("model", f"{given_model(args.model_name_or_path)}{_weights(explained.weights)}"),
        ("rows", _rows(explained)),
    ]
    rows += [("" if number else "an epoch", line) for number, line in enumerate(_order(explained.data.order))]
    rows += [("steps", _steps(explained)), ("update", _update(plan)), ("tokens", _tokens(plan))]
    rows += [("a pass", _pass(plan)), ("learning rate", _rate(explained))]
    rows += [(name, _occasion(explained, kind)) for name, kind in
             (("logging", "logging"), ("evaluation", "eval"), ("checkpoints", "save"))]  # fmt: skip
    width = max(len(name) for name, _ in rows)
    return ["What the run will do", *(f"  {name:<{width}}  {text}" for name, text in rows)]


def _weights(counted) -> str:
    if counted is None:
        return " (its weights cannot be counted here)"
    share = 100 * counted.trained / counted.weights
    return f", {counted.weights:,} weights, {counted.trained:,} trained ({share:.3g} %)"


def _rows(explained) -> str:
    plan, report = explained.plan, explained.data.report
    packed = f" in {plan['rows']:,} packed rows" if explained.values.get("packing") else ""
    text = f"{explained.data.rows_trained():,} of {report.rows:,} train{packed}"
    if explained.data.stream is not None:
        first = len(explained.data.train)
        text = (
            f"{report.rows:,} are streamed, less those that are dropped; tokens are estimated from the first {first:,}"
        )
    text += f", {report.dropped_rows():,} are left out ({report.counts()})" if report.dropped else ""
    text += f", {report.untrained_answers()}" if report.untrained else ""
    more = plan["rows_repeated"]
    if more:
        text += f", {more:,} repeated, so that all processes have as many" if more > 0 else (
            f", {-more:,} of an epoch are left out (--dataloader_drop_last)"
        )  # fmt: skip
    return f"{text}, {plan['rows_to_evaluate']:,} evaluate" if plan["rows_to_evaluate"] else text


def _order(order) -> list[str]:
    """The rows of each source in an epoch, or the name of the order."""
    if order is None:
        return []
    return [order.name, *format_mixture(order.table())] if isinstance(order, Mixture) else [order.name]


def _steps(explained) -> str:
    plan = explained.plan
    by = "--max_steps" if explained.train_args.max_steps > 0 else "--num_train_epochs"
    epochs = f"{plan['epochs']:.4g} {'epoch' if plan['epochs'] == 1 else 'epochs'}"
    text = f"{format_count(plan['steps'], 'update')} = {epochs} of {plan['updates_per_epoch']:,} ({by})"
    resumed = explained.train_args.resume_from_checkpoint
    return f"{text}, resumed from {resumed}" if resumed else text


def _update(plan: dict) -> str:
    passes, processes = plan["passes_per_update"], plan["processes"]
    examples, rows = plan["examples_per_update"], plan["rows_per_update"]
    text = f"{rows['largest']:,} examples"
    if examples != rows:
        text = f"{_range(examples)} examples in {rows['largest']:,} rows"
    factors = f"{format_count(processes, 'process')} × {format_count(passes, 'pass')}"
    last = f", {rows['smallest']:,} in the last of an epoch" if rows["smallest"] < rows["largest"] else ""
    return f"{text} ({factors} × {plan['rows_per_pass']['largest']:,} rows{last})"


def _range(spread: dict) -> str:
    low, high = spread["smallest"], spread["largest"]
    return f"{high:,}" if low == high else f"{low:,} to {high:,}"


def _tokens(plan: dict) -> str:
    tokens, trained = plan["tokens_per_update"], plan["trained_tokens_per_update"]
    share = 100 * trained["mean"] / tokens["mean"]
    return (
        f"{tokens['mean']:,.0f} an update on average, {share:.0f} % of them trained; at most {tokens['largest']:,} "
        f"in the first epoch (update {tokens['at']:,}); {tokens['mean'] * plan['steps']:,.0f} in the whole run"
    )


def _pass(plan: dict) -> str:
    computed = plan["computed_per_pass"]
    padding = f", {100 * plan['padding']:.0f} % of them padding" if plan["padding"] else ""
    return f"{computed['mean']:,.0f} tokens on average{padding}; at most {computed['largest']:,}"


def _rate(explained) -> str:
    rates, schedule = explained.plan["learning_rate"], explained.values["lr_scheduler_type"]
    if rates is None:
        return f"{explained.values['learning_rate']:g}, then according to evaluations ({schedule})"
    first, highest, last = (f"{rates[name]:.3g}" for name in ("first", "highest", "last"))
    warmup = (
        f" after {format_count(explained.plan['warmup_steps'], 'step')} of warm-up"
        if rates["first"] < rates["highest"]
        else ""
    )
    return f"{first} at first, {highest} at most{warmup}, {last} at last ({schedule})"


def _occasion(explained, kind: str) -> str:
    when = explained.plan[kind]
    if not when["times"]:
        if when["strategy"] == "best":
            return "whenever an evaluation is the best so far"
        without = kind == "eval" and not explained.plan["rows_to_evaluate"]
        return f"none ({'no rows for it' if without else f'--{kind}_strategy ' + when['strategy']})"
    every = "every step" if when["every"] == 1 else f"every {when['every']:,} steps" if when["every"] else None
    text = f"{every or 'at the end of each epoch'}, {format_count(when['times'], 'time')}"
    if kind == "eval":
        text += f", {format_count(explained.plan['passes_per_evaluation'], 'pass')} each"
    limit = explained.values.get("save_total_limit")
    return f"{text}; the newest {limit} are kept" if kind == "save" and limit else text


def value_tables(explained, everything: bool) -> list[str]:
    """The values with their sources, a table for each kind of source."""
    tables = []
    for kind, title in _GROUPS.items():
        rows = [
            (name, format_setting(explained.values[name]), _where(source))
            for name, source in explained.sources.items()
            if source.kind == kind and (everything or _is_shown(explained, name, source))
        ]
        if rows:
            tables.append(f"Values: {title}\n{table(rows)}")
    return tables


def _where(source) -> str:
    return f"{source.where} (in place of {source.before.where})" if source.before else source.where


def _is_shown(explained, name: str, source) -> bool:
    """Whether a value is shown by default: someone set it, or it is a default of ours that is on and has an effect."""
    if source.internal or (name in explained.no_effect and not source.chosen):
        return False
    return source.kind != "default" or explained.values[name] not in (None, False, 0)


def table(rows: list[tuple[str, str, str]]) -> str:
    """Three columns, aligned."""
    first = max(len(name) for name, _, _ in rows)
    second = min(_MAX_WIDTH, max(len(value) for _, value, _ in rows))
    return "\n".join(f"  {name:<{first}}  {value:<{second}}  {where}" for name, value, where in rows)


def no_effect_lines(explained, everything: bool) -> list[str]:
    """Settings without effect, by reason: those that someone set, or all of them."""
    reasons: dict[str, list[str]] = {}
    hidden = 0
    for name, why in explained.no_effect.items():
        source = explained.sources[name]
        if everything or source.chosen:
            reasons.setdefault(why, []).append(f"{name} {format_setting(explained.values[name])} ({_where(source)})")
        else:
            hidden += 1
    lines = [f"  {', '.join(names)}\n    {why}" for why, names in reasons.items()]
    lines += [
        f"  {name} at {where}\n    it has no type annotation (`{name}: … = …`), so the dataclass ignores it"
        for name, where in explained.unannotated.items()
    ]
    if not lines:
        return [
            f"Everything that was set has an effect here; {hidden} settings that nobody set have none (--all true)."
        ]
    more = f"\n  and {hidden} settings that nobody set (--all true)" if hidden else ""
    return ["Without effect here\n" + "\n".join(lines) + more]


def diff_text(diff: dict) -> str:
    """The differences from an earlier run as a table."""
    title = f"Compared with {diff['run']}"
    if not diff["differs"]:
        return f"{title}: nothing differs"
    rows = [
        (name, f"{change['then']} → {change['now']}", change["from"] if change["from"] else "")
        for name, change in diff["differs"].items()
    ]
    return f"{title}, then → now\n{table(rows)}"
