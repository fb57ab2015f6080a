"""The record of a run: arguments, data files, base, versions and hardware. `--config` and other commands read it."""

import dataclasses
import re

from utils.config.deepspeed import short_name
from utils.data.mixture import Mixture
from utils.model.source import given_model
from utils.runtime.environment import hardware, launcher, versions
from utils.storage.weights import weights_fingerprint

_SECRET = re.compile(r"(?<!s)token(?!s)|api_?key|secret|passw|credential")


def effective_args(args, train_args) -> dict:
    """Every value the run uses, by dataclass, without tokens and other secrets."""
    common = dataclasses.asdict(args) | {"model_name_or_path": given_model(args.model_name_or_path)}
    parts = {"common": common, "trainer": train_args.to_dict()}
    values_of = {
        part: {name: value for name, value in values.items() if not _SECRET.search(name)}
        for part, values in parts.items()
    }
    # a name instead of a path, so that the record can be used on another machine
    values_of["trainer"]["deepspeed"] = short_name(values_of["trainer"].get("deepspeed"))
    return values_of | {"versions": versions()}


def run_record(args, train_args, data) -> dict:
    """The record before the training; the data files may change during it.

    Args:
        args: CommonArgs.
        train_args: the recipe's TrainArgument.
        data: the prepared rows.
    """
    # the fingerprint identifies the weights an adapter belongs to
    fingerprint = weights_fingerprint(args.model_name_or_path)
    base = {"path": given_model(args.model_name_or_path), "fingerprint": fingerprint}
    record = effective_args(args, train_args) | {"base": base, "data": data_record(data)}
    if args.adapter_name_or_path:
        record["adapter"] = {
            "path": args.adapter_name_or_path,
            "fingerprint": weights_fingerprint(args.adapter_name_or_path),
        }
    return record | {"hardware": hardware(), "start": launcher()}


def data_record(data) -> dict:
    """The record of the data files and what became of their rows; of streamed rows it is complete after the training.

    The checksum of a streamed file covers parts of it (`utils.data.stream_index.fingerprint`), and has a name of its
    own.
    """
    checksum = "sha256" if data.stream is None else "fingerprint"
    rows = {"train": _rows_record(data.report, checksum) | {"trained": data.rows_trained()}}
    if isinstance(data.order, Mixture):
        rows["train"]["sources"] = [dataclasses.asdict(source) for source in data.order.sources]
    if data.eval is not None:
        held_back = {"held_back": data.held_back}
        rows["eval"] = _rows_record(data.eval_report) if data.eval_report else held_back
    return rows


def streamed_rows(report) -> dict:
    """The streamed rows that were read up to the last checkpoint, as in `data_record`."""
    return _rows_record(report, "fingerprint") | {"trained": report.kept}


def _rows_record(report, checksum: str = "sha256") -> dict:
    files = [{"file": file, "bytes": report.bytes_of[file], checksum: report.hashes[file]} for file in report.files]
    names = ("rows", "kept", "dropped", "shortened", "answers", "untrained", "tokens", "trained_tokens")
    return {"files": files, **{name: getattr(report, name) for name in names}}
