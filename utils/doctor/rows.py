"""Findings about the rows, from the census of their texts and from the report of their preparation."""

from collections import Counter
from collections.abc import Callable

from utils.data.bad_rows import EmptyRow, EqualPair
from utils.data.files import parse_row, raw_rows
from utils.data.places import RowLocations
from utils.data.report import BROKEN_UNICODE, MALFORMED, SHORTENED, TOO_LONG, DataReport, RowGroup
from utils.doctor.census import Census
from utils.doctor.codes import ERROR, WARNING
from utils.doctor.findings import Finding
from utils.doctor.text import SCRIPTS
from utils.runtime.text import format_count
from utils.template.messages import UNTRAINED_ANSWER

_STRAY = 0.01  # below this share of the rows a script is a stray one
_MIXED = 0.03  # from this share of the rows on it is one of several
_DIFFER = 0.1  # share of answers in another script than their questions from which it is reported
_LATIN = SCRIPTS.index("Latin")
_REASONS = 5  # at most so many are listed


def census_findings(train: Census, held_back: Census | None) -> list[Finding]:
    """Checks the texts of the training and validation rows, and for rows that are in both.

    Args:
        train: of the training rows.
        held_back: of the validation rows; None where there are none.
    """
    findings = _duplicates(train)
    findings += _in_both(train, held_back) if held_back is not None else []
    for part in filter(None, (train, held_back)):
        findings += _flagged(part)
    return findings + _stray_scripts(train) + _scripts(train)


def _duplicates(census: Census) -> list[Finding]:
    import numpy

    _, first, inverse, counts = numpy.unique(census.rows, return_index=True, return_inverse=True, return_counts=True)
    repeats = numpy.flatnonzero(first[inverse] != numpy.arange(len(census.rows)))
    if not len(repeats):
        return []
    example, original = (_place(census, row) for row in (repeats[0], first[inverse[repeats[0]]]))
    message = (
        f"{format_count(len(repeats), 'row')} of {len(census.rows):,} repeat an earlier one; {example} "
        f"repeats {original}"
    )
    if counts.max() > 2:
        message += f"; the most frequent appears {counts.max():,} times"
    return [Finding("DUPLICATE_ROWS", message, census.places(census.sources[repeats]))]


def _in_both(train: Census, held_back: Census) -> list[Finding]:
    import numpy

    same_question = numpy.isin(held_back.questions, train.questions)
    whole = numpy.isin(held_back.rows, train.rows)
    found = numpy.flatnonzero(same_question | whole)
    if not len(found):
        return []
    message = (
        f"{format_count(len(found), 'row')} of {len(held_back.rows):,} for validation have a question that is in the "
        f"training rows too, {int(whole.sum()):,} with the same answer"
    )
    return [Finding("EVAL_IN_TRAIN", message, held_back.places(held_back.sources[found]))]


def _flagged(census: Census) -> list[Finding]:
    what = {
        "UNICODE_BROKEN": "broken Unicode",
        "INVISIBLE_CHARACTERS": "invisible characters",
        "SPECIAL_TOKEN_IN_CONTENT": "the text of a special token",
    }
    findings = []
    for code, found in census.flags.items():
        kinds = Counter(detail for _, detail in found)
        named = ", ".join(f"{detail} ({count:,})" for detail, count in kinds.most_common(5))
        named += ", …" if len(kinds) > 5 else ""
        places = census.places([source for source, _ in found])
        findings.append(Finding(code, f"{format_count(len(found), 'row')} with {what[code]}: {named}", places))
    return findings


def _stray_scripts(census: Census) -> list[Finding]:
    """Finds the few rows wholly in another script than the others; Latin is in every corpus, as code and names."""
    import numpy

    question, answer = census.scripts.T
    whole = numpy.where((question == answer) | (question == 0), answer, 0)
    findings = []
    for script in range(1, len(SCRIPTS)):
        rows = numpy.flatnonzero(whole == script)
        if script != _LATIN and 0 < len(rows) < _STRAY * len(whole):
            message = f"{format_count(len(rows), 'row')} of {len(whole):,} are wholly in {SCRIPTS[script]}"
            findings.append(Finding("LANGUAGE_STRAY", message, census.places(census.sources[rows])))
    return findings


def _scripts(census: Census) -> list[Finding]:
    import numpy

    question, answer = census.scripts.T
    scripts = numpy.where(question == 0, answer, question)
    counts = numpy.bincount(scripts, minlength=len(SCRIPTS))
    counts[0] = 0
    total = max(1, int(counts.sum()))
    main = {SCRIPTS[script]: counts[script] / total for script in counts.argsort()[::-1]}
    main = {name: share for name, share in main.items() if share >= _MIXED}
    both = (question != 0) & (answer != 0)
    differ = (both & (question != answer)).sum() / max(1, both.sum())
    if len(main) < 2 and differ < _DIFFER:
        return []
    shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in main.items())
    message = f"scripts of the rows: {shares}"
    if differ >= _DIFFER:
        message += f"; {100 * differ:.0f} % of the answers are in another script than their question"
    return [Finding("LANGUAGES_MIXED", message)]


# ------------------------------------------------------------------ rows that are left out or shortened


def report_findings(report: DataReport, args, measure: Callable[[list[RowGroup]], str]) -> list[Finding]:
    """Makes findings of the rows that the preparation drops, shortens or leaves untrained.

    Args:
        report: of rows that were prepared, if need be with `--on_bad_row drop`.
        args: CommonArgs, which say what stops a run.
        measure: groups of rows → how long they are.
    """
    unreadable = WARNING if args.on_bad_row == "drop" else ERROR
    empty = ERROR if args.on_bad_row == "error" else WARNING
    codes = _codes(unreadable, empty) | {TOO_LONG: ("ROW_TOO_LONG", ERROR if args.overlong == "error" else WARNING)}
    rows = [
        (*codes.get(group.kind, codes[EmptyRow.kind]), group.file, group.reason, RowLocations(group.lines, group.count))
        for group in report.dropped_groups()
    ]
    findings = left_out(rows, report.rows)
    for finding in findings:
        if finding.code == "ROW_TOO_LONG":
            finding.message += measure(report.groups(TOO_LONG))
    findings += [Finding("FIELDS_UNREAD", line) for line in report.unread_fields()] + _untrained(report)
    if report.shortened:
        shortened = report.groups(SHORTENED)
        places = {group.file: RowLocations(group.lines, group.count) for group in shortened}
        count = format_count(report.shortened, "row")
        message = f"{count} of {report.rows:,} are longer than --max_len {args.max_len} allows"
        if args.task.row_type.has_prompt_limit:
            message += f", or than --max_prompt_length {args.max_prompt_length}"
        message += f", and are cut at their beginning{measure(shortened)}"
        findings.append(Finding("ROW_SHORTENED", message, places))
    return findings


def _untrained(report: DataReport) -> list[Finding]:
    """Finds answers of kept rows that are not trained although `--train_on` selects them."""
    if not report.untrained:
        return []
    places: dict[str, RowLocations] = {}
    reasons: Counter = Counter()
    for group in report.groups(UNTRAINED_ANSWER):
        reasons[group.reason] += group.count
        kept = places.setdefault(group.file, RowLocations())
        kept.lines, kept.count = sorted({*kept.lines, *group.lines}), kept.count + group.count
    named = "; ".join(f"{reason} ({count:,})" for reason, count in reasons.most_common(_REASONS))
    message = f"{report.untrained_answers()}: {named}"
    return [Finding("ANSWER_NOT_TRAINED", message, places)]


def problem_findings(census: Census, args) -> list[Finding]:
    """Makes findings of unreadable rows if the rows could not be prepared; an error if no readable row is left."""
    others = len(census.sources) > 0
    codes = _codes(
        unreadable=WARNING if args.on_bad_row == "drop" and others else ERROR,
        empty=WARNING if args.on_bad_row != "error" and others else ERROR,
    )
    rows = [
        (*codes.get(record.kind, codes[EmptyRow.kind]), record.file, record.reason, RowLocations([record.line], 1))
        for record in census.problems
    ]
    return left_out(rows, len(census.sources) + len(census.problems))


def _codes(unreadable: str, empty: str) -> dict[str, tuple[str, str]]:
    """Returns the code and the severity for each kind of dropped row.

    Args:
        unreadable: the severity of rows that cannot be read.
        empty: that of rows with nothing to train.
    """
    return {
        MALFORMED: ("ROW_UNREADABLE", unreadable),
        BROKEN_UNICODE: ("UNICODE_BROKEN", unreadable),
        EmptyRow.kind: ("ROW_NOTHING_TRAINED", empty),
        EqualPair.kind: ("PAIR_EQUAL", empty),
    }


def left_out(rows: list[tuple[str, str, str, str, RowLocations]], total: int) -> list[Finding]:
    """Makes one finding for each code.

    Args:
        rows: code, severity, file, reason and places of some rows.
        total: of all rows.
    """
    places: dict[tuple[str, str], dict[str, RowLocations]] = {}
    reasons: dict[tuple[str, str], Counter] = {}
    for code, severity, file, reason, found in rows:
        key = code, severity
        reasons.setdefault(key, Counter())[reason] += found.count
        kept = places.setdefault(key, {}).setdefault(file, RowLocations())
        kept.lines, kept.count = sorted(kept.lines + found.lines), kept.count + found.count
    findings = []
    for (code, severity), why in reasons.items():
        counted = len(why) > 1
        named = "; ".join(reason + f" ({count:,})" * counted for reason, count in why.most_common(_REASONS))
        more = f"; and {len(why) - _REASONS:,} other reasons" if len(why) > _REASONS else ""
        message = f"{format_count(why.total(), 'row')} of {total:,}: {named}{more}"
        findings.append(Finding(code, message, places[code, severity], severity))
    return findings


def _place(census: Census, row: int) -> str:
    ((file, places),) = census.places([census.sources[row]]).items()
    return f"{file}:{places.lines[0]}"


def describe_lengths(groups: list[RowGroup], args, template, tokenizer) -> str:
    """Describes the lengths of rows that are too long: of those the report lists, at most a hundred of each file.

    `"; 44 of them measured: 1,025 to 3,204 tokens"`

    Args:
        groups: of the report.
        args: CommonArgs.
        template: the chat template; None for plain text.
        tokenizer: the rows' own.
    """
    if args.task.row_type.token_counts is None:
        return ""
    counts = []
    for group in groups:
        counts += _count_tokens_of_rows(group.file, set(group.lines), args, template, tokenizer)
    rows = [total for total, _ in counts]
    text = f"; {len(rows):,} of them measured: {min(rows):,} to {max(rows):,} tokens"
    if args.task.row_type.has_prompt_limit:
        text += f", prompts of up to {max(prompt for _, prompt in counts):,}"
    return text


def _count_tokens_of_rows(file: str, lines: set[int], args, template, tokenizer) -> list[tuple[int, int]]:
    """Counts the tokens of each row, and of its prompt if that has a limit of its own."""
    values = []
    for row in raw_rows(file):
        if row.line in lines:
            values.append(parse_row(row).value)
        if row.line >= max(lines):
            break
    row_type = args.task.row_type
    return [row_type.token_counts(row_type.read(value), template, tokenizer) for value in values]
