"""The folder of a merge is written completely or not at all, and replaces only an earlier merge."""

import pytest
from merging import listing

from utils.export.merge_folder import atomic_folder
from utils.runtime.errors import UserError


def test_leftovers_of_a_killed_merge_are_removed_and_the_old_folder_restored(tmp_path):
    """Killed while writing, or between the two renames."""
    folder, part, old = tmp_path / "merged", tmp_path / ".merged.part", tmp_path / ".merged.old"
    part.mkdir()
    (part / ".merging").touch()
    (part / "torso").write_text("half")
    old.mkdir()
    (old / "earlier").write_text("whole")
    (old / "merged.json").write_text('{"files": {"earlier": 5}}')
    with pytest.raises(RuntimeError), atomic_folder(folder, "--output_dir x") as written:
        assert not (written / "torso").exists() and (folder / "earlier").read_text() == "whole"
        raise RuntimeError
    assert listing(tmp_path).keys() == {"merged/earlier", "merged/merged.json"}
    with atomic_folder(folder, "--output_dir x") as written:
        (written / "new").write_text("whole")
    assert listing(tmp_path).keys() == {"merged/new"}


@pytest.mark.parametrize("change", ["added", "changed", "link", "while merging"])
def test_a_changed_merged_folder_is_not_replaced(tmp_path, change):
    folder = tmp_path / "merged"
    folder.mkdir()
    (folder / "model.safetensors").write_text("whole")
    (folder / "merged.json").write_text('{"files": {"model.safetensors": 5}}')
    if change == "changed":
        (folder / "model.safetensors").write_text("another")
    elif change == "link":
        (tmp_path / "elsewhere").write_text("whole")
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    elif change == "added":
        (folder / "sub").mkdir()
        (folder / "sub" / "model.gguf").write_text("mine")
    with (
        pytest.raises(UserError, match="which no merge wrote"),
        atomic_folder(folder, "--output_dir x") as written,
    ):
        (written / "new").write_text("whole")
        if change == "while merging":
            (folder / "notes.txt").write_text("mine")
    assert "new" not in {path.name for path in tmp_path.rglob("*")}
    assert (folder / "merged.json").exists() and not (tmp_path / ".merged.part").exists()


def test_a_users_folder_with_a_temporary_name_is_kept(tmp_path):
    for name in (".merged.part", ".merged.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("x")
    (tmp_path / "merged").mkdir()
    with pytest.raises(UserError, match="cannot be written"), atomic_folder(tmp_path / "merged", "--output_dir x"):
        pass
    assert listing(tmp_path).keys() == {".merged.part/mine", ".merged.old/mine"}
