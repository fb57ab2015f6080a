"""Files that are written completely or not at all, and what a folder that cannot be written to is refused with."""

import json
import os

import pytest

from utils.storage import files
from utils.storage.files import (
    checksum,
    existing_parent,
    project_path,
    replace_file,
    sha256_of,
    write_json,
    write_refusal,
    write_text,
)


def test_a_file_is_replaced_when_the_block_ends(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("old")
    with replace_file(file) as part:
        assert part.parent == tmp_path and part.name == "a.txt.part"
        part.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, error):
    file = tmp_path / "a.txt"
    file.write_text("old")
    with pytest.raises(type(error)), replace_file(file) as part:
        part.write_text("ne")
        raise error
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_what_a_killed_process_left_is_replaced(tmp_path):
    (tmp_path / "a.txt.part").write_text("a longer rest of an earlier write")
    write_text(tmp_path / "a.txt", "é")
    assert (tmp_path / "a.txt").read_bytes() == "é".encode() and os.listdir(tmp_path) == ["a.txt"]


def test_the_content_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(files.os, "fsync", lambda _: done.append("content"))
    replace = os.replace
    monkeypatch.setattr(files.os, "replace", lambda *paths: (done.append("name"), replace(*paths)))
    write_text(tmp_path / "a.txt", "text")
    assert done == ["content", "name"]


def test_json_is_written_for_people(tmp_path):
    write_json(tmp_path / "a.json", {"name": "é", "path": tmp_path, "none": None})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert text.startswith('{\n  "name": "é",') and text.endswith("}\n")
    assert json.loads(text) == {"name": "é", "path": str(tmp_path), "none": None}


def test_a_folder_that_can_be_written_to_stays_empty(tmp_path):
    assert write_refusal(tmp_path) is None and list(tmp_path.iterdir()) == []
    assert write_refusal(tmp_path / "new" / "folder") is None and list(tmp_path.iterdir()) == []


def test_a_folder_below_a_file_is_refused_with_the_reason_and_the_place(tmp_path):
    (tmp_path / "file").write_text("")
    assert write_refusal(tmp_path / "file" / "folder") == f"Not a directory ({tmp_path / 'file'})"


def test_a_full_or_read_only_disk_is_refused(tmp_path, monkeypatch):
    def fail(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(files.tempfile, "TemporaryDirectory", fail)
    assert write_refusal(tmp_path / "new") == f"Read-only file system ({tmp_path})"


def test_the_nearest_folder_that_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert existing_parent(tmp_path) == existing_parent(tmp_path / "a" / "b") == tmp_path.resolve()
    assert existing_parent(files.Path("a/b")) == tmp_path.resolve()


def test_checksums(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert checksum(str(file)) == (known, 3) and sha256_of(str(file)) == known


def test_a_relative_path_is_looked_for_in_the_project_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert project_path("train_args") == str(files.ROOT / "train_args")
    assert project_path("nowhere/at/all") == "nowhere/at/all" and project_path("") == ""
    (tmp_path / "train_args").mkdir()
    assert project_path("train_args") == "train_args"
