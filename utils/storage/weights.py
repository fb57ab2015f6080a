"""Inspects safetensors files without loading them: headers, sizes, completeness, fingerprints."""

import hashlib
import json
import math
from pathlib import Path

from utils.runtime.errors import Problem, refusal

# type → bytes of a weight
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}

_SAMPLE = 64  # bytes read at three places of each tensor


def weight_files(folder: str | Path) -> list[Path]:
    """Returns the safetensors files of a folder or of a downloaded hub model; empty if there are none."""
    if not Path(folder).is_dir():
        from transformers.utils import cached_file

        try:
            folder = Path(cached_file(str(folder), "config.json", local_files_only=True)).parent
        except OSError:
            return []
    return sorted(Path(folder).glob("*.safetensors"))


def read_header(file: Path) -> tuple[dict, int]:
    """Reads the header of a safetensors file; returns it and the offset of the data.

    `{"lm_head.weight": {"dtype": "BF16", "shape": [8192, 256], "data_offsets": [0, 4194304]}, …}`

    Raises:
        ValueError: the file is cut off, or is none of that kind; the message names it.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{file} is cut off or is no safetensors file ({size:,} bytes)")
        try:
            header = json.loads(opened.read(length))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, AttributeError, KeyError, TypeError, IndexError):
            raise ValueError(f"{file} is damaged: its header cannot be read") from None
    if size != 8 + length + end:
        raise ValueError(
            f"{file} is cut off or damaged: it has {size:,} bytes, and its header says {8 + length + end:,}"
        )
    return header, 8 + length


def check_weight_files(what: str, folder: str | Path, *flags: str) -> list[Problem]:
    """Checks a folder's safetensors files for truncation and damage, without reading the weights.

    Args:
        what: what the folder is, for the messages: the flag with its value.
        folder: where the files lie.
        *flags: names of the flags that the problems are about.
    """
    problems = []
    for file in weight_files(folder):
        try:
            read_header(file)
        except (ValueError, OSError) as error:
            problems += refusal(f"{what}: {error}; copy or download it again", *flags)
    return problems


def weights_fingerprint(folder: str | Path) -> str | None:
    """Returns a short hash of the weights in a folder, the same for any division into files.

    Made of each tensor's name, type and shape and of bytes at its beginning, middle and end, so that it takes
    milliseconds for a 7B model too.

    Returns:
        16 hexadecimal digits, or None where there are no safetensors files to read.
    """
    parts = []
    for file in weight_files(folder):
        try:
            header, start = read_header(file)
        except (ValueError, OSError):
            return None
        with file.open("rb") as opened:
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                sample = b""
                for place in (begin, (begin + end) // 2, max(begin, end - _SAMPLE)):
                    opened.seek(start + place)
                    sample += opened.read(min(_SAMPLE, end - place))
                parts.append(f"{name} {entry['dtype']} {entry['shape']} {sample.hex()}")
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()[:16] if parts else None


def weights_size(base: str, dtype: str | None) -> int:
    """Returns the bytes of a model's weights in `dtype`, or as saved; 0 if they are not on this machine."""
    entries = [entry for file in weight_files(base) for entry in read_header(file)[0].values()]
    if dtype:
        return sum(DTYPES[dtype] * math.prod(entry["shape"]) for entry in entries)
    return sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in entries)
