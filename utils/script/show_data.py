"""Shows the first rows as the model sees them, with trained tokens marked, and the lengths of all rows.

python -m utils.script.show_data --train_data_path my_rows.jsonl        # and any flag of main_train.py
python -m utils.script.show_data --rows 1 --ids true
"""

import math
import statistics
import sys
from collections import Counter
from dataclasses import dataclass

from utils.args import parse_args
from utils.config.flags import arg, make_parser, read_flags, split_own
from utils.data.mixture import Mixture, format_mixture
from utils.data.places import RowLocations, decode_source
from utils.data.row_type import Sequence
from utils.runtime.command import run_command
from utils.runtime.errors import raise_if_any
from utils.runtime.log import setup_logging
from utils.template.messages import UNTRAINED_ANSWER
from utils.template.tokenize import IGNORE_INDEX

_COLOUR, _PLAIN = "\x1b[32m", "\x1b[0m"  # green
_BARS = 40


@dataclass
class ShowDataArgs:
    """Flags of this command; all others are main_train.py's."""

    rows: int = arg(3, "How many rows to show.")
    ids: bool = arg(False, "Show the token ids and labels as well.")


def mark_trained(row: Sequence, tokenizer, colour: bool) -> str:
    """The text of a sequence, with trained tokens in colour, or in brackets without colour.

    `"…assistant\\n[[Hello!<|im_end|>]]\\n"`
    """
    before, after = (_COLOUR, _PLAIN) if colour else ("[[", "]]")
    parts, start = [], 0
    trained = [label != IGNORE_INDEX for label in row.labels]
    for end in range(1, len(trained) + 1):
        if end == len(trained) or trained[end] != trained[start]:
            # decoded as a difference, as some tokenizers drop a space at the start of a text
            text = tokenizer.decode(row.input_ids[:end])[len(tokenizer.decode(row.input_ids[:start])) :]
            parts.append(f"{before}{text}{after}" if trained[start] else text)
            start = end
    return "".join(parts)


def weights_of(row: Sequence) -> str:
    """`", 12 of them with weight 0.5"`; empty where all trained tokens have weight 1."""
    pairs = zip(row.labels, row.weights or [1.0] * len(row.labels), strict=True)
    counts = Counter(weight for label, weight in pairs if label != IGNORE_INDEX and weight != 1)
    return "".join(f", {count} of them with weight {weight:g}" for weight, count in sorted(counts.items()))


def census(lengths: list[int], max_len: int) -> str:
    """A text histogram of the rows' lengths in tokens."""
    ordered = sorted(lengths)
    lines = [
        f"lengths: {ordered[0]} to {ordered[-1]} tokens, mean {statistics.mean(ordered):.0f}, "
        f"median {statistics.median(ordered):.0f}, 95 % up to {ordered[math.ceil(0.95 * len(ordered)) - 1]}, "
        f"--max_len {max_len}"
    ]
    step = max(1, -(-ordered[-1] // 10))
    counts = [sum(low < length <= low + step for length in ordered) for low in range(0, ordered[-1], step)]
    for i, count in enumerate(counts):
        bar = "█" * round(_BARS * count / max(counts))
        lines.append(f"  {i * step + 1:>6} – {(i + 1) * step:<6} {count:>8,} {bar}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    mine, rest = split_own(argv, ShowDataArgs)
    setup_logging()
    values, _, problems = read_flags(make_parser([ShowDataArgs], "utils.script.show_data", __doc__), mine)
    shown = ShowDataArgs(**values)
    if shown.rows < 0:
        problems.append(f"--rows {shown.rows} is not allowed; give a whole number of at least 0")
    raise_if_any(problems)
    args, train_args = parse_args(rest)

    from utils.model.tokenizer import load_run_tokenizer
    from utils.runtime.log import route_library_logs
    from utils.template import get_run_template

    route_library_logs()
    tokenizer = load_run_tokenizer(args)
    task, row_type = args.task, args.task.row_type
    template = get_run_template(args, tokenizer) if task.uses_template else None
    data = task.load_datasets(args, train_args, template, tokenizer)
    order = range(len(data.train)) if data.order is None else data.order.indices(0)  # of the first epoch
    for row in data.train.select(order[: shown.rows]):
        place = ", ".join(f"{data.report.files[file]}:{line}" for file, line in map(decode_source, row["source"]))
        for part in row_type.sequences(row):
            trained = sum(label != IGNORE_INDEX for label in part.labels)
            name = f", {part.name}" if part.name else ""
            print(f"--- {place}{name}: {len(part.input_ids)} tokens, {trained} trained{weights_of(part)}")
            print(mark_trained(part, tokenizer, sys.stdout.isatty()))
            if shown.ids:
                print("ids   ", part.input_ids)
                print("labels", part.labels)
        for name, value in row_type.other_columns(row).items():
            print(f"{name}: {value}")
    report = data.checked()
    if data.stream is not None:
        print(f"--- streamed: of {data.report.rows:,} rows the first {report.rows:,} are counted here")
    print(f"--- {report.kept:,} of {report.rows:,} rows are trained on, {report.dropped_rows():,} left out")
    if report.not_chosen:
        print(f"{report.not_chosen:,} of {report.answers:,} answers are left out by --train_on {args.train_on}")
    if report.untrained:
        print(report.untrained_answers() + ":")
        for group in report.groups(UNTRAINED_ANSWER):
            print(f"  {group.file}: {RowLocations(group.lines, group.count)} {group.reason}")
    print(report.token_share())
    if isinstance(data.order, Mixture):
        print("\n".join(["--- an epoch of the mixture", *format_mixture(data.order.table())]))
    lengths = [row_type.length(row) for row in data.train]
    print(census(lengths, args.max_len))


if __name__ == "__main__":
    run_command(main)
