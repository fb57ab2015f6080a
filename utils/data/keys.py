"""What prepared rows depend on, as a key of the cache, and what they are, as a key of their own.

Neither depends on paths, seeds, the clock, or the number of processes.
"""

import contextlib
import hashlib
import importlib.metadata
import json

from utils.data.encode import RowKind
from utils.runtime.errors import UserError
from utils.storage.files import checksum

_FORMAT_VERSION = 9  # raise it when a change of the code makes other ids, labels or another report of the same row


def content_key(hashes: dict[str, str], kind: RowKind, on_bad_row: str) -> str:
    """A hash of everything that prepared rows depend on.

    Args:
        hashes: file → the sha256 of its content.
        kind: the task's way with rows.
        on_bad_row: as in CommonArgs.
    """
    tokenizers = importlib.metadata.version("tokenizers")
    parts = {"version": _FORMAT_VERSION, "tokenizers": tokenizers, "on_bad_row": on_bad_row, **kind.key}
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    for sha in hashes.values():
        digest.update(bytes.fromhex(sha))
    return digest.hexdigest()[:32]


def tokenizer_key(tokenizer) -> str:
    """A hash that changes with anything in the tokenizer that changes ids."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # of the last call, not of the tokenizer
    parts = {name: part for name, part in state.items() if name not in ("truncation", "padding")}
    parts |= {"names": tokenizer.special_tokens_map, "split": tokenizer.split_special_tokens}
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def rows_key(dataset) -> str:
    """A hash of the ids and labels of all rows in their order, whatever files and libraries they came from."""
    import pyarrow.compute

    digest = hashlib.sha256()
    for name in sorted(set(dataset.column_names) - {"source"}):
        lengths, values = hashlib.sha256(name.encode()), hashlib.sha256()
        for chunk in dataset.data.column(name).chunks:
            lengths.update(pyarrow.compute.list_value_length(chunk).to_numpy(zero_copy_only=False))
            values.update(chunk.flatten().to_numpy(zero_copy_only=False))
        digest.update(lengths.digest() + values.digest())
    return digest.hexdigest()


def check_unchanged(hashes: dict[str, str]) -> None:
    """A file that another program appends to while it is read would be trained under a false checksum."""
    changed = []
    for file, sha in hashes.items():
        with contextlib.suppress(OSError):  # removed is changed, too
            if checksum(file)[0] == sha:
                continue
        changed.append(f"{file!r} was changed while it was read; start again once no other program writes to it")
    if changed:
        raise UserError(*changed)
