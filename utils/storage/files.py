"""Paths, checksums, free space, and files that are written completely or not at all."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def project_path(path: str) -> str:
    """Resolves a relative path against the current folder, then against the project's root."""
    if path and not os.path.exists(path) and os.path.exists(ROOT / path):  # False where Path's would raise
        return str(ROOT / path)
    return path


def is_one_of(path: str | Path, files: Iterable[str | Path]) -> bool:
    """Whether a path is one of some files, however it is spelled and through links of both kinds."""
    path = Path(path)
    return any(
        path.resolve() == Path(file).resolve() or (path.exists() and Path(file).exists() and path.samefile(file))
        for file in files
    )


def sha256_of(file: str) -> str:
    """Returns a file's SHA-256 as hexadecimal digits, as `sha256sum` prints it."""
    return checksum(file)[0]


def checksum(file: str) -> tuple[str, int]:
    """Returns a file's SHA-256 and its number of bytes; that of a `.bin` covers its index, a `.idx` beside it, too."""
    with open(file, "rb") as content:
        digest, size = hashlib.file_digest(content, "sha256"), content.tell()
    index = Path(file).with_suffix(".idx")
    if Path(file).suffix == ".bin" and index.is_file():
        digest.update(index.read_bytes())
    return digest.hexdigest(), size


@contextlib.contextmanager
def replace_file(file: Path) -> Iterator[Path]:
    """Yields a temporary path to write to, which replaces `file` at the end of the block.

    Until then `file` stays as it was; if the block raises, the temporary file is removed. A process that is killed
    leaves the temporary file, `<name>.part` in the same folder, which the next write replaces.
    """
    part = file.with_name(f"{file.name}.part")  # in the same folder, where a rename is atomic
    try:
        yield part
        with part.open("rb") as written:
            os.fsync(written.fileno())  # or a power failure could leave the new name with no content
        os.replace(part, file)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def write_text(file: Path, text: str) -> None:
    """Writes a file in UTF-8, completely or not at all; see `replace_file`."""
    with replace_file(file) as part:
        part.write_text(text, encoding="utf-8")


def write_json(file: Path, values: dict) -> None:
    """Writes values as indented JSON, completely or not at all; what JSON does not know is written as text."""
    write_text(file, json.dumps(values, indent=2, ensure_ascii=False, default=str) + "\n")


def existing_parent(path: Path) -> Path:
    """Returns the path itself or the nearest folder above it that exists."""
    path = path.resolve()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def write_refusal(folder: Path) -> str | None:
    """Returns why nothing can be written into a folder, or into the nearest one above that exists; None if it can.

    `"Permission denied (/data)"`. Only a real attempt shows permissions, a read-only disk and a full one.
    """
    existing = existing_parent(folder)
    try:
        with tempfile.TemporaryDirectory(dir=existing):
            return None
    except OSError as error:
        return f"{os.strerror(error.errno or 0)} ({existing})"
