"""Paths below the project, hashes of files, JSON written whole or not at all."""

import hashlib
import json
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def project_path(path: str) -> str:
    """A relative path as it stands, or below this project where only there it exists."""
    if path and not os.path.exists(path) and os.path.exists(ROOT / path):  # False where Path's would raise
        return str(ROOT / path)
    return path


def sha256_of(file: str) -> str:
    """A file's hash, as `sha256sum` says it."""
    return checksum(file)[0]


def checksum(file: str) -> tuple[str, int]:
    """A file's sha256, and of how many bytes it is."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest(), content.tell()


def write_record(record: dict, path: Path) -> None:
    """Writes the record of a run as JSON, whole or not at all."""
    temporary = path.with_name(path.name + "~")
    temporary.write_text(json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    os.replace(temporary, path)
