"""Prepares each source of a mixture by itself, and joins their rows; sets the order of a curriculum."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy
from loguru import logger

from utils.data.curriculum import curriculum_order
from utils.data.lengths import token_counts
from utils.data.mixture import Mixture, format_mixture, order_seed, strategy_of
from utils.data.places import encode_source
from utils.data.prepare import Data
from utils.data.report import DataReport
from utils.data.sources import Source, is_mixture, read_sources
from utils.runtime.errors import Problem, UserError
from utils.template.with_source import with_source_settings

_FLAG = "train_data_path"


def loads_sources(load: Callable) -> Callable:
    """Extends a task's `load_datasets`, which prepares the files of one source, to `--train_data_path` of several.

    Args:
        load: (args, train_args, template or None, tokenizer) → Data.
    """

    @functools.wraps(load)
    def load_all(args, train_args, template, tokenizer) -> Data:
        mixed = is_mixture(args) and not args.streaming
        options = (args, train_args, template, tokenizer)
        data = _load_mixture(load, *options) if mixed else load(*options)
        return dataclasses.replace(data, order=curriculum_order(args, train_args, data)) if _sorted(args) else data

    return load_all


def _sorted(args) -> bool:
    return args.curriculum != "none" and bool(args.train_data_path)


def split_sources(args) -> Iterator[tuple[Source, object]]:
    """Yields each source with the arguments that prepare it alone.

    Raises:
        UserError: the sources cannot be read.
    """
    sources, problems = read_sources(args.train_data_path)
    if problems:
        raise UserError(*problems)
    for source in sources:
        alone = {"train_data_path": source.path, "eval_data_path": None, "mixing_strategy": None, "curriculum": "none"}
        alone |= {"columns": source.columns or args.columns, "val_size": 0.0 if args.eval_data_path else args.val_size}
        yield source, dataclasses.replace(args, **alone)


def _load_mixture(load: Callable, args, train_args, template, tokenizer) -> Data:
    """Prepares the rows of each source, and the validation rows of `--eval_data_path` or of all sources."""
    parts: list[tuple[Source, Data]] = []
    for source, alone in split_sources(args):
        logger.info("source {}: {}", source.name, source.path)
        source_template = with_source_settings(template, source)
        with _naming(source):
            parts.append((source, load(alone, train_args, source_template, tokenizer)))
    starts = numpy.cumsum([0, *(len(data.report.files) for _, data in parts)])
    train = _join([_shift_files(data.train, start) for (_, data), start in zip(parts, starts, strict=False)])
    held_back = [_shift_files(data.eval, start) for (_, data), start in zip(parts, starts, strict=False) if data.eval]
    sources, report = tuple(source for source, _ in parts), _merge_reports([data.report for _, data in parts])
    names = tuple(source.name for source, data in parts for _ in data.report.files)
    data = Data(
        train,
        _join(held_back) if held_back else None,
        report,
        held_back=sum(data.held_back for _, data in parts),
        source_names=names,
        eval_source_names=names if held_back else (),
        order=_mix(args, train_args, sources, [data for _, data in parts]),
    )
    for line in format_mixture(data.order.table()):
        logger.info("in an epoch of the mixture: {}", line)
    if not args.eval_data_path:
        return data
    alone = dataclasses.replace(args, train_data_path="", mixing_strategy=None)
    evaluated = load(alone, train_args, template, tokenizer)
    names = evaluated.eval_source_names
    return dataclasses.replace(data, eval=evaluated.eval, eval_report=evaluated.eval_report, eval_source_names=names)


@contextmanager
def _naming(source: Source):
    """Adds the source's name to each problem of a `UserError`, whose flags were not given for this source alone."""
    try:
        yield
    except UserError as error:
        about = f"--{_FLAG}: of the source {source.name!r}: "
        problems = []
        for problem in error.problems:
            flags = tuple(dict.fromkeys((*problem.flags, _FLAG)))
            problems.append(dataclasses.replace(problem, message=about + problem.message, flags=flags))
        raise UserError(*problems) from error


def _mix(args, train_args, sources: tuple[Source, ...], parts: list[Data]) -> Mixture:
    strategy = strategy_of(args, sources)
    sizes = tuple(len(data.train) for data in parts)
    tokens = tuple(float(token_counts(data.train, args.task.row_type).mean()) for data in parts)
    if len(sources) == 1 and sources[0].weight is not None:
        logger.warning("--train_data_path: the weight of the only source has no effect; all of its rows are trained")
    packed, seed = args.task.packs(train_args), order_seed(train_args)
    return Mixture(sources, sizes, tokens, strategy, args.mixing_unit, args.mixing_stop, seed, packed)


def _shift_files(dataset, start: int):
    """Adds `start` to the number of each row's file in the column `source`, without a copy of the other columns."""
    import pyarrow
    import pyarrow.compute
    from datasets import Dataset
    from datasets.table import InMemoryTable, concat_tables

    if not start:
        return dataset
    add = pyarrow.scalar(encode_source(int(start), 0), pyarrow.int64())
    chunks = []
    for chunk in dataset.data.column("source").chunks:
        offsets = pyarrow.compute.subtract(chunk.offsets, chunk.offsets[0])
        chunks.append(type(chunk).from_arrays(offsets, pyarrow.compute.add(chunk.flatten(), add)))
    column = InMemoryTable(pyarrow.table({"source": pyarrow.chunked_array(chunks)}))
    table = concat_tables([dataset.data.drop(["source"]), column], axis=1)
    return Dataset(table, info=dataset.info.copy(), split=dataset.split, indices_table=dataset._indices)


def _join(parts: list):
    from datasets import concatenate_datasets

    return concatenate_datasets(parts)


def _merge_reports(reports: list[DataReport]) -> DataReport:
    """Adds the reports of all sources up, with the files of all."""
    total = DataReport()
    for report in reports:
        total.merge(report)
        total.files += report.files
        total.hashes |= report.hashes
        total.bytes_of |= report.bytes_of
    total.key = hashlib.sha256(" ".join(report.key for report in reports).encode()).hexdigest()
    return total


def refuse_unless_plain(args, command: str) -> None:
    """Raises a `UserError` in a command that does not take a mixture."""
    if is_mixture(args):
        message = f"--train_data_path is a mixture, which {command} does not take; give one of its sources"
        raise UserError(Problem(message, flags=("train_data_path",)))
