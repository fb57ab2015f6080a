"""Token ids in Megatron-LM's indexed files: documents in `name.bin`, which is mapped into memory; places in `name.idx`.

The layout is that of `megatron/core/datasets/indexed_dataset.py` in NVIDIA's Megatron-LM, version 1: in `.idx`
the 9 bytes `MMIDIDX\\0\\0`, the version as uint64, a code of the type of ids as uint8, the numbers of sequences S and
of document boundaries D as uint64; then the length of each sequence, [S] of int32, its first byte in `.bin`, [S] of
int64, and the first sequence of each document and an end, [D] of int64. All are little-endian.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

from utils.data.json_rows import RawRow

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}  # 6 and 7 are not whole numbers


def index_of(file: str) -> Path:
    """The index of an indexed file: `a/rows.bin` → `a/rows.idx`."""
    return Path(file).with_suffix(".idx")


def read_indexed(file: str) -> Iterator[RawRow]:
    """Yields each document as a row of `input_ids`; it is numbered from 1, as lines are."""
    import numpy

    try:
        lengths, starts, documents, kind = _read_index(file)
    except ValueError as error:
        yield RawRow(file, 0, None, str(error), fatal=True)
        return
    tokens = numpy.memmap(file, kind, "r") if Path(file).stat().st_size else numpy.empty(0, kind)
    for number in range(len(documents) - 1):
        first, after = int(documents[number]), int(documents[number + 1])
        pieces = [tokens[starts[i] // tokens.itemsize :][: lengths[i]] for i in range(first, after)]
        ids = numpy.concatenate(pieces).tolist() if pieces else []
        yield RawRow(file, number + 1, {"input_ids": ids}, None if ids else "is a document without tokens")


def _read_index(file: str):
    """The lengths and first bytes of sequences, the first sequences of documents, and the NumPy type of ids.

    Raises:
        ValueError: the index is missing or malformed, or does not fit the file; the text completes "rows.bin …".
    """
    import numpy

    index = index_of(file)
    if not index.is_file():
        raise ValueError(f"has no index {index.name} beside it; give both files of an indexed data set of Megatron-LM")
    content = index.read_bytes()
    if len(content) < _HEADER.size or content[:9] != _MAGIC:
        raise ValueError(f"has an index {index.name} that is not one of Megatron-LM (it does not begin with MMIDIDX)")
    _, version, code, count, boundaries = _HEADER.unpack_from(content)
    if version != 1 or code not in _TYPES:
        raise ValueError(f"has an index of version {version} with ids of type {code}; version 1 with integers is read")
    kind = numpy.dtype(_TYPES[code]).newbyteorder("<")
    size = _HEADER.size + 12 * count + 8 * boundaries
    if len(content) < size:
        raise ValueError(f"has an index {index.name} of {len(content):,} bytes, not {size:,}; copy it again")
    lengths = numpy.frombuffer(content, "<i4", count, _HEADER.size)
    starts = numpy.frombuffer(content, "<i8", count, _HEADER.size + 4 * count)
    documents = numpy.frombuffer(content, "<i8", boundaries, _HEADER.size + 12 * count)
    ends = starts + lengths.astype("int64") * kind.itemsize
    fits = not count or (starts.min() >= 0 and lengths.min() >= 0 and ends.max() <= Path(file).stat().st_size)
    rising = (documents[:-1] <= documents[1:]).all()
    if not fits or (boundaries and not (documents[0] >= 0 and rising and documents[-1] <= count)):
        raise ValueError(f"does not fit its index {index.name}: sequences end beyond the file; copy both again")
    return lengths, starts, documents, kind
