"""Which folders and names are models."""

import pytest
from parsing import problems_of


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: None, "does not exist"),
        (lambda folder: folder.mkdir(), "no config.json"),
        (lambda folder: folder.write_text(""), "is a file"),
        (lambda folder: (folder.mkdir(), (folder / "config.json").write_text("{}")), "no *.safetensors"),
        (lambda folder: (folder.mkdir(), (folder / "adapter_config.json").write_text("{}")), "an adapter"),
    ],
)
def test_model_folders_that_are_none(parse, tmp_path, make, said):
    make(tmp_path / "model")
    assert said in problems_of(parse, "--model_name_or_path", str(tmp_path / "model"))[0]


def test_a_model_folder_that_cannot_be_read(parse):
    said = problems_of(parse, "--model_name_or_path", "/" + "x" * 300)[0]
    assert "cannot be read: File name too long" in said


def test_a_misspelt_folder_shows_its_neighbour(parse):
    text = problems_of(parse, "--model_name_or_path", "data/tiny_modle")[0]
    assert "Did you mean 'data/tiny_model'" in text


def test_a_hub_name_is_not_taken_for_a_path(parse):
    assert parse("--model_name_or_path", "Qwen/Qwen1.5-7B")[0].model_name_or_path == "Qwen/Qwen1.5-7B"


def test_only_folders_with_a_model_are_suggested(parse, tmp_path):
    for name in ("llama-7b", "llama-8b", "llama-9"):
        (tmp_path / name).mkdir()
    (tmp_path / "llama-8b" / "config.json").write_text("{}")
    (tmp_path / "other").mkdir()  # in the same long folder, and of another name
    (tmp_path / "other" / "config.json").write_text("{}")
    said = problems_of(parse, "--model_name_or_path", str(tmp_path / "llama-6b"))[0]
    assert f"does not exist. Did you mean '{tmp_path / 'llama-8b'}'? Give" in said
    assert "Did you mean" not in problems_of(parse, "--model_name_or_path", "/nomodel")[0]
