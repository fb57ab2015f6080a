"""Checks of prepared rows as arrays: stop tokens, BOS, lengths. Milliseconds for tens of thousands of rows."""

from collections.abc import Iterator

from utils.data.lengths import list_lengths, sequence_lengths
from utils.data.places import locate_sources
from utils.data.report import DataReport
from utils.data.row_type import RowType, SequenceColumns
from utils.doctor.codes import ERROR, WARNING
from utils.doctor.findings import Finding
from utils.template.tokenize import IGNORE_INDEX

_BIASED = 0.8  # share of pairs with the same side longer from which it is a bias
_PAIRS = 20  # with fewer pairs the share says little


def arrays(dataset, name: str) -> Iterator[tuple]:
    """Yields a column of lists as (values, offsets), for each of Arrow's chunks.

    Row i is values[offsets[i]:offsets[i + 1]]. It is all rows of the table, also those that a split of it leaves to
    the other part.
    """
    for chunk in dataset.data.column(name).chunks:
        offsets = chunk.offsets.to_numpy()
        yield chunk.flatten().to_numpy(zero_copy_only=False), offsets - offsets[0]  # the chunk may be a slice


def sources(dataset):
    """Returns the source of each row, [rows]; the first one of a packed row."""
    import numpy

    return numpy.concatenate([values[offsets[:-1]] for values, offsets in arrays(dataset, "source")])


def token_findings(
    dataset, report: DataReport, args, tokenizer, stop: str | None, call_stop: str = ""
) -> list[Finding]:
    """Checks the ids and labels of prepared rows.

    Args:
        dataset: of a task's `load_datasets`.
        report: on these rows.
        args: CommonArgs.
        tokenizer: the rows' own.
        stop: the token that ends an answer; None for plain text.
        call_stop: the token that ends a tool call, if that is another one.
    """
    row_type, files = args.task.row_type, report.files
    findings = _bos(dataset, files, row_type.sequence_columns[0].ids[0], tokenizer)
    if stop is None:
        findings += _ends(dataset, row_type, tokenizer)
    else:
        for columns in row_type.sequence_columns:
            stops = [stop, call_stop] if call_stop else [stop]
            findings += _stops(dataset, files, columns, tokenizer, stops, last=args.train_on != "prompt")
    for finding in findings:
        if report.token_rows:  # which end as those who made them wished
            finding.severity = WARNING
    return findings + (_length_bias(dataset, row_type) if row_type.compares_answers else [])


def _stops(dataset, files, columns: SequenceColumns, tokenizer, stops: list[str], last: bool = True) -> list[Finding]:
    """Checks that the last trained token of each row is a stop token; with `last` false, that one is trained at all."""
    import numpy

    stop_ids = tokenizer.convert_tokens_to_ids(stops)
    without = []
    for values, offsets in arrays(dataset, columns.labels):
        if not last:
            found = numpy.concatenate([[0], numpy.isin(values, stop_ids).cumsum()])
            without.append(found[offsets[1:]] == found[offsets[:-1]])
            continue
        trained = numpy.where(values != IGNORE_INDEX, numpy.arange(len(values)), -1)
        place = numpy.maximum.accumulate(trained)[offsets[1:] - 1] if len(values) else offsets[1:] - 1
        has = (place >= offsets[:-1]) & (place >= 0)
        without.append(~has | ~numpy.isin(values[numpy.maximum(place, 0)], stop_ids))
    rows = numpy.flatnonzero(numpy.concatenate(without))
    total = dataset.data.num_rows
    if not len(rows):
        return []
    side = f" ({columns.name})" if columns.name else ""
    what = "a last trained token other than" if last else "no trained token"
    message = f"{len(rows):,} of {total:,} rows{side} have {what} {' or '.join(map(repr, stops))}"
    # a few such rows teach little; where all are, the model never stops
    return [
        Finding("STOP_NOT_TRAINED", message, _places(dataset, rows, files), ERROR if len(rows) == total else WARNING)
    ]


def _ends(dataset, row_type: RowType, tokenizer) -> list[Finding]:
    """Checks that plain text, packed and split, has a trained end token at all."""
    columns = [columns.labels for columns in row_type.sequence_columns]
    if any((values == tokenizer.eos_token_id).any() for name in columns for values, _ in arrays(dataset, name)):
        return []
    return [Finding("STOP_NOT_TRAINED", f"no row has the trained token {tokenizer.eos_token!r}, which ends a text")]


def _bos(dataset, files, name: str, tokenizer) -> list[Finding]:
    import numpy

    bos = tokenizer.bos_token_id
    if bos is None:
        return []
    first, second = [], []
    for values, offsets in arrays(dataset, name):
        padded = numpy.append(values, [IGNORE_INDEX, IGNORE_INDEX])
        long = numpy.diff(offsets)
        first.append((padded[offsets[:-1]] == bos) & (long > 0))
        second.append((padded[offsets[:-1] + 1] == bos) & (long > 1))
    first, second = numpy.concatenate(first), numpy.concatenate(second)
    findings = []
    rows = numpy.flatnonzero(first & second)
    if len(rows):
        message = f"{len(rows):,} of {len(first):,} rows begin with {tokenizer.bos_token!r} twice"
        findings.append(Finding("BOS_DOUBLE", message, _places(dataset, rows, files)))
    if not first.any() and tokenizer("a")["input_ids"][:1] == [bos]:
        message = f"no row begins with {tokenizer.bos_token!r}, which the tokenizer sets before every text"
        findings.append(Finding("BOS_MISSING", message))
    return findings


def _length_bias(dataset, row_type: RowType) -> list[Finding]:
    """Checks that neither answer of the pairs is nearly always the longer one."""
    (name_a, ids_a, _), (name_b, ids_b, _) = row_type.sequence_columns
    first, second = (list_lengths(dataset.data, ids[-1]) for ids in (ids_a, ids_b))
    if len(first) < _PAIRS:
        return []
    findings = []
    for name, longer, shorter in ((name_a, first, second), (name_b, second, first)):
        share = (longer > shorter).mean()
        if share >= _BIASED:
            message = (
                f"in {100 * share:.0f} % of {len(first):,} pairs the {name} answer is the longer one; on average "
                f"{name_a} has {first.mean():.0f} tokens and {name_b} {second.mean():.0f}"
            )
            findings.append(Finding("PAIR_LENGTH_BIAS", message))
    return findings


def row_lengths(dataset, row_type: RowType):
    """Returns how many positions each row takes, [rows]; for packed rows, each row within, [rows within]."""
    import numpy

    if "seq_lengths" in dataset.column_names:
        return numpy.concatenate([values for values, _ in arrays(dataset, "seq_lengths")])
    return numpy.maximum.reduce(sequence_lengths(dataset.data, row_type))


def eval_in_train_findings(data, rows: int | None, row_type: RowType) -> list[Finding]:
    """Finds validation rows with the ids of a training row; for packed rows, the rows within.

    Args:
        data: of a task's `load_datasets`.
        rows: so many of the training and of the validation rows are looked at, the first; None for all.
        row_type: of the rows.
    """
    trained = {ids for ids, _ in _identities(data.train, rows, row_type)}
    held_back = list(_identities(data.eval, rows, row_type))
    found = [source for ids, source in held_back if ids in trained]
    if not found:
        return []
    message = f"{len(found):,} of {len(held_back):,} rows for validation have the ids of a training row"
    files = (data.eval_report or data.report).files
    both = sorted(set(files) & set(data.report.files)) if data.eval_report else []
    message += f"; {both[0]!r} is given for both" if both else ""
    packed = "seq_lengths" in data.eval.column_names  # where its parts come from is not kept
    return [Finding("EVAL_IN_TRAIN", message, {} if packed else locate_sources(found, files))]


def _identities(dataset, rows: int | None, row_type: RowType) -> Iterator[tuple[int, int]]:
    """Yields a hash of each row's ids and its source; for a packed row, one for each row within."""
    names = row_type.id_columns()
    packed = "seq_lengths" in dataset.column_names
    first = dataset.select(range(len(dataset) if rows is None else min(rows, len(dataset))))
    columns = [*names, "source", *(["seq_lengths"] if packed else [])]
    for batch in first.select_columns(columns).with_format("arrow").iter(1000):
        lists = {name: batch.column(name).combine_chunks() for name in columns}
        # where the rows end in the flat ids, [rows + 1]
        ends = {name: _ends_of(lists["seq_lengths"] if packed else lists[name], packed) for name in names}
        flat = {name: lists[name].flatten().to_numpy(zero_copy_only=False) for name in names}
        sources = lists["source"].to_pylist()
        for row in range(len(next(iter(ends.values()))) - 1):
            texts = [flat[name][ends[name][row] : ends[name][row + 1]].tobytes() for name in names]
            yield hash(tuple(texts)), 0 if packed else sources[row][0]


def _ends_of(lists, are_lengths: bool):
    import numpy

    if are_lengths:
        return numpy.concatenate([[0], lists.flatten().to_numpy(zero_copy_only=False).cumsum()])
    offsets = lists.offsets.to_numpy()
    return offsets - offsets[0]


def _places(dataset, rows, files):
    return locate_sources(sources(dataset)[rows], files)
