"""Keeps prepared rows on disk: the key they are found by, the lock while they are made, the folder itself.

A key depends on no seed, clock, number of processes, or path beyond the suffix, which decides how a file is read.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from loguru import logger

from utils.data.json_rows import kind_of_file
from utils.data.report import DataReport, from_stored, to_stored
from utils.runtime.distributed import is_local_main_process
from utils.runtime.errors import UserError
from utils.storage.files import checksum

# raise it whenever a code change produces other ids or labels, or another report, for the same rows
_FORMAT_VERSION = 17
_REPORT = "report.json"
_LIBRARIES = ("tokenizers", "transformers", "jinja2")  # that render and encode


def content_key(hashes: dict[str, str], encoding: dict, on_bad_row: str) -> str:
    """Returns a hash of everything that prepared rows depend on.

    Args:
        hashes: file → the sha256 of its content.
        encoding: everything that encoding a row depends on, `RowEncoder.key`.
        on_bad_row: as in CommonArgs.
    """
    versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return hash_settings({"version": _FORMAT_VERSION, **versions, "on_bad_row": on_bad_row, **encoding}, hashes)


def hash_settings(settings: dict, hashes: dict[str, str]) -> str:
    """Returns a hash of settings, and of the files of `hashes` in their order."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for sha in hashes.values():
        digest.update(bytes.fromhex(sha))
    return digest.hexdigest()[:32]


def tokenizer_key(tokenizer) -> str:
    """Returns a hash that changes with anything in the tokenizer that changes ids."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # truncation and padding are left from the previous call
    parts = {name: part for name, part in state.items() if name not in ("truncation", "padding")}
    parts |= {"names": tokenizer.special_tokens_map, "split": tokenizer.split_special_tokens}
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def rows_key(dataset) -> str:
    """Returns a hash of the ids and labels of all rows in order, independent of the files they came from."""
    import pyarrow.compute

    digest = hashlib.sha256()
    for name in sorted(set(dataset.column_names) - {"source"}):
        lengths, values = hashlib.sha256(name.encode()), hashlib.sha256()
        for chunk in dataset.data.column(name).chunks:
            if not _is_list_of_integers(chunk.type):
                values.update("".join(f"{json.dumps(value)}\n" for value in chunk.to_pylist()).encode())
                continue
            lengths.update(pyarrow.compute.list_value_length(chunk).to_numpy(zero_copy_only=False))
            values.update(chunk.flatten().to_numpy(zero_copy_only=False))
        digest.update(lengths.digest() + values.digest())
    return digest.hexdigest()


def _is_list_of_integers(kind) -> bool:
    import pyarrow

    is_list = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
    return is_list and pyarrow.types.is_integer(kind.value_type)


def check_unchanged(hashes: dict[str, str]) -> None:
    """Raises a `UserError` for each file that another program changed since it was hashed.

    Its rows would otherwise be kept under the checksum of the earlier content.
    """
    changed = []
    for file, sha in hashes.items():
        with contextlib.suppress(OSError):  # a removed file counts as changed
            if checksum(file)[0] == sha:
                continue
        changed.append(f"{file!r} was changed while it was read; start again once no other program writes to it")
    if changed:
        raise UserError(*changed)


def cache_folder(cache_dir: str | None, files: list[str], content: str) -> Path:
    """Returns the folder for prepared rows, named by a hash of their content key and the kinds of the files.

    Args:
        cache_dir: the folder of all prepared rows; None for `llm_dojo` in the cache of `datasets`.
        files: paths; only their suffixes count.
        content: from `content_key`.
    """
    import datasets

    root = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "llm_dojo").expanduser()
    kinds = [(kind_of_file(file), Path(file).suffix.lower()) for file in files]
    return root / hashlib.sha256(json.dumps([content, kinds]).encode()).hexdigest()[:32]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lets one process at a time prepare a folder; others wait as long as that takes.

    It is a lock of the operating system rather than a collective, which would time out; it is released when its
    holder dies.

    Raises:
        UserError: the parent folder cannot be created.
    """
    from filelock import FileLock

    if not is_local_main_process():
        # let the first process of this machine take the lock, since it shows the progress bar
        deadline = time.monotonic() + 10
        while not folder.exists() and not _lock_file(folder).exists() and time.monotonic() < deadline:
            time.sleep(0.1)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"prepared rows cannot be kept in {str(folder.parent)!r}: {error.strerror}; pass another --cache_dir"
        ) from error
    with FileLock(_lock_file(folder)):
        try:
            yield
        finally:
            _lock_file(folder).unlink(missing_ok=True)  # while held: filelock grants no removed file


def _lock_file(folder: Path) -> Path:
    """The lock is in the temporary folder of this machine, since several machines may share the disk of the rows."""
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
    return Path(tempfile.gettempdir()) / f"llm_dojo-{os.getuid()}-{name}.lock"


def load_cached(folder: Path, files: list[str]):
    """Returns the (datasets.Dataset, DataReport) stored in `folder`; None if it is absent or damaged."""
    from datasets import load_from_disk

    if not folder.is_dir():
        return None
    try:
        stored = json.loads((folder / _REPORT).read_text(encoding="utf-8"))
        # other files are allowed: TRL stores the log-probabilities of the reference model beside the rows
        if any((folder / name).stat().st_size != size for name, size in stored.pop("sizes").items()):
            raise ValueError("a file is missing or truncated")
        report = from_stored(stored, files)
        report.rename_files(files)
        return without_unused_weights(load_from_disk(str(folder))), report
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("the prepared rows in {} are damaged ({}); they are prepared again", folder, error)
        shutil.rmtree(folder, ignore_errors=True)
        return None


def without_unused_weights(dataset):
    """Prepared rows without the column of weights, where it is null in all of them."""
    name = "loss_weights"
    unused = name in dataset.column_names and dataset.data.column(name).null_count == len(dataset)
    return dataset.remove_columns(name) if unused else dataset


def store(report: DataReport, rows: Path, folder: Path) -> None:
    """Adds the report to a finished folder of rows and renames it to `folder`, so that no partial one is ever found.

    Args:
        report: what became of the rows.
        rows: a folder on the same disk, as `save_to_disk` leaves it.
        folder: from `cache_folder`.
    """
    sizes = {path.name: path.stat().st_size for path in rows.iterdir()}
    (rows / _REPORT).write_text(json.dumps({**to_stored(report), "sizes": sizes}), encoding="utf-8")
    try:
        os.rename(rows, folder)
    except OSError:
        # another run prepared the same rows meanwhile, and its folder serves as well
        if not (folder / _REPORT).is_file():
            raise


def save_arrow_file(dataset, file: Path, folder: Path) -> None:
    """Moves an Arrow file into a folder that `load_from_disk` reads.

    `Dataset.save_to_disk` would read all rows into memory and write them a second time.

    Args:
        dataset: the rows of the file.
        file: moved into the folder.
        folder: created.
    """
    dataset.select(range(1)).save_to_disk(str(folder))
    (first_row,) = folder.glob("*.arrow")
    file.replace(first_row)
