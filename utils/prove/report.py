"""Formats the outcomes of utils.script.prove as text and as JSON."""

import math
from dataclasses import asdict

from utils.model.source import given_model
from utils.prove.figures import Count


def show_list() -> str:
    """Every proof with its claim, its method and its tolerance."""
    from utils.prove.registry import PROOFS

    return "\n".join(
        f"{name}: {proof.says}\n    {proof.how}\n    tolerance {proof.tolerance}" for name, proof in PROOFS.items()
    )


def lines_of(outcome) -> str:
    """A proof as it is printed: the verdict, and a line for each measure."""
    verdict, width = outcome.verdict, 13
    mark = {True: "✓", False: "✗", None: "–"}[verdict.holds]
    head = f"{mark} {outcome.name:<{width}}{outcome.proof.says}"
    if verdict.why_not is not None:
        return f"{head}: does not apply: {verdict.why_not}"
    if verdict.failure is not None:
        return f"{head}: {verdict.failure}"
    texts = [_measure(measure) for measure in verdict.measures]
    return "\n".join([f"{head}  ({outcome.seconds:.1f} s)", *(f"    {text}" for text in texts)])


def _measure(measure) -> str:
    mark = "" if measure.holds else "  ← too far"
    if isinstance(measure, Count):
        return f"{measure.what}: {measure.found:g} {measure.unit}{mark}"
    return (
        f"{measure.what}: {measure.expected:.8g} and {measure.found:.8g}, {measure.unit} difference "
        f"{measure.difference:.1e}, tolerance {measure.tolerance:g}{mark}"
    )


def as_json(outcomes: list, subject) -> dict:
    """All outcomes; `holds` is null for a proof that does not apply."""
    from utils.data.places import row_location

    return {
        "holds": all(outcome.verdict.holds is not False for outcome in outcomes),
        "model": given_model(subject.args.model_name_or_path),
        "rows": [
            {"file": subject.data.report.files[number], "line": line}
            for number, line in map(row_location, subject.rows)
        ],
        "proofs": [
            {
                "name": outcome.name,
                "says": outcome.proof.says,
                "holds": outcome.verdict.holds,
                "does_not_apply": outcome.verdict.why_not,
                "failure": outcome.verdict.failure,
                "seconds": round(outcome.seconds, 1),
                "measures": [_finite(asdict(item)) | {"holds": item.holds} for item in outcome.verdict.measures],
            }
            for outcome in outcomes
        ],
    }


def _finite(values: dict) -> dict:
    """Replaces NaN and infinity, which JSON cannot hold, by null."""
    return {name: None if value != value or value in (math.inf, -math.inf) else value for name, value in values.items()}
