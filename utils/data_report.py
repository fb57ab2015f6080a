"""What became of the rows: how many are trained on, which are left out, and why."""

from dataclasses import dataclass, field

from loguru import logger

from utils.errors import UserError

SHOWN = 20  # so many bad rows are named one by one


@dataclass
class DataReport:
    """What became of the rows of one set of files.

    Attributes:
        rows: how many rows the files hold.
        kept: how many are trained on.
        tokens: all their tokens; `trained_tokens` those with a label.
        dropped: reason → how many rows.
        places: the first dropped rows, `"file:line reason"`.
        shortened: how many rows lost their oldest turns to fit.
    """

    rows: int = 0
    kept: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    places: list[str] = field(default_factory=list)
    shortened: int = 0

    def drop(self, place: str, reason: str, kind: str) -> None:
        self.dropped[kind] = self.dropped.get(kind, 0) + 1
        if len(self.places) < SHOWN:
            self.places.append(f"{place} {reason}")

    def dropped_rows(self) -> int:
        return sum(self.dropped.values())

    def log(self, name: str) -> None:
        """Says in the log what was kept and, by file and line, what was not."""
        share = 100 * self.trained_tokens / max(self.tokens, 1)
        logger.info(
            "{}: {:,} of {:,} rows, {:,} tokens, {:.0f} % of them trained",
            name,
            self.kept,
            self.rows,
            self.tokens,
            share,
        )
        if self.shortened:
            logger.warning("{}: {:,} rows were longer than --max_len and lost their oldest turns", name, self.shortened)
        if self.dropped:
            counts = ", ".join(f"{count:,} {kind}" for kind, count in self.dropped.items())
            shown = "".join(f"\n  {place}" for place in self.places)
            rest = self.dropped_rows() - len(self.places)
            more = f"\n  … and {rest:,} more" if rest else ""
            logger.warning("{}: {:,} rows are left out ({}):{}{}", name, self.dropped_rows(), counts, shown, more)


def refuse_nothing_left(report: DataReport, left: int, files: list[str]) -> None:
    if left:
        return
    if not report.rows:
        raise UserError(f"{', '.join(files)} holds no row")
    places = "".join(f"\n     {place}" for place in report.places)
    counts = ", ".join(f"{count:,} {kind}" for kind, count in report.dropped.items())
    raise UserError(
        f"none of the {report.rows:,} rows keeps a trained token ({counts}):{places}\n"
        "   Raise --max_len if they are too long, or mend the rows"
    )
