"""A GGUF file as a base, through every command, also after the converted folder was removed from the cache."""

import json
import shutil
from pathlib import Path

import gguf_files
import pytest

import main_train
from utils.args import parse_args, parse_with_sources
from utils.infer.load import base_of_run
from utils.model.gguf import save_converted
from utils.runtime.errors import UserError
from utils.script import evaluate, infer, merge_lora

pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on a GGUF file: (its folder, the file, the folder of converted models)."""
    at = tmp_path_factory.mktemp("gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HOME", str(at / "hf"))
        patch.setattr("utils.model.gguf._run_conversion", _in_process)
        model, tokenizer = gguf_files.small_llama()
        file = gguf_files.write_gguf(at / "m.gguf", model, tokenizer, "Q8_0", template=gguf_files.CHAT_TEMPLATE)
        rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}] * 4
        (at / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        main_train.main(
            ["--model_name_or_path", str(file), "--train_data_path", str(at / "rows.jsonl"), "--max_steps", "2",
             "--output_dir", str(at / "run"), "--card_samples", "0", "--report_to", "none"]
        )  # fmt: skip
        yield at / "run", file, at / "hf" / "llm_dojo" / "models"


def _in_process(path, given, folder, size):
    save_converted(Path(path), folder)


def test_a_run_records_the_file_and_its_adapter_names_the_converted_folder(trained):
    run, file, models = trained
    record = json.loads((run / "train_args.json").read_text())
    assert record["common"]["model_name_or_path"] == base_of_run(run)["path"] == str(file)
    assert record["common"]["template_name"] == "auto"
    (folder,) = models.iterdir()
    assert json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)
    assert "m.gguf" in (run / "README.md").read_text()


def test_the_base_comes_from_its_flag_also_when_it_is_converted_already(trained, tmp_path):
    run, file, _ = trained
    rows = ["--train_data_path", str(run.parent / "rows.jsonl"), "--output_dir", str(tmp_path / "run")]
    sources = parse_with_sources(["--model_name_or_path", str(file), *rows])[2]
    assert (sources["model_name_or_path"].kind, sources["model_name_or_path"].before) == ("flag", None)


def test_the_folder_is_converted_again_when_it_is_gone(trained, tmp_path):
    run, file, models = trained
    for use in (
        lambda: infer.parse(["--model_path", str(run), "--prompt", "Hi"])[1].base,
        lambda: merge_lora.parse(["--model_path", str(run), "--output_dir", str(tmp_path / "merged")])[1].base,
        lambda: evaluate.parse(["--model_path", str(run), "--eval_data_path", str(run.parent / "rows.jsonl"),
                                "--output", str(tmp_path / "e.jsonl")])[1]["base"].base,
        lambda: main_train.parse_args(["--adapter_name_or_path", str(run), "--train_data_path",
                                       str(run.parent / "rows.jsonl")])[0].model_name_or_path,
        lambda: main_train.parse_args(["--config", str(run)])[0].model_name_or_path,
    ):  # fmt: skip
        shutil.rmtree(models)
        base = Path(use())
        assert base.parent == models and (base / "model.safetensors").is_file()


def test_a_run_on_a_file_that_was_moved_finds_it_again(trained, tmp_path):
    _, file, models = trained
    made_again = ["--train_data_path", str(file.parent / "rows.jsonl"), "--max_steps", "1", "--card_samples", "0",
                  "--output_dir", str(tmp_path / "run"), "--report_to", "none"]  # fmt: skip
    parse_args(["--model_name_or_path", str(file)])  # converts it
    moved = file.rename(tmp_path / "m.gguf")
    try:
        main_train.main(["--model_name_or_path", str(moved), *made_again])
        record = json.loads((tmp_path / "run" / "train_args.json").read_text())
        assert record["common"]["model_name_or_path"] == record["base"]["path"] == str(moved)
        shutil.rmtree(models)
        base = Path(infer.parse(["--model_path", str(tmp_path / "run"), "--prompt", "Hi"])[1].base)
        assert base.parent == models
    finally:
        moved.rename(file)


def test_another_file_is_not_taken_for_the_base(trained):
    run, file, models = trained
    shutil.rmtree(models)
    content = file.read_bytes()
    model, tokenizer = gguf_files.small_llama()
    try:
        gguf_files.write_gguf(file, model, tokenizer, "Q4_0")  # at the same path
        with pytest.raises(UserError) as refused:
            infer.parse(["--model_path", str(run), "--prompt", "Hi"])
        assert "which does not exist; give its new path as --base_model" in str(refused.value)
        with pytest.raises(UserError) as refused:
            infer.parse(["--model_path", str(run), "--prompt", "Hi", "--base_model", str(file)])
        assert "with the weights" in str(refused.value)
    finally:
        file.write_bytes(content)


def test_a_converted_folder_is_not_written_into(trained):
    with pytest.raises(UserError) as refused:
        merge_lora.parse(["--model_path", str(trained[1]), "--modelfile", "true"])
    assert "no Modelfile" in str(refused.value) or "cache" in str(refused.value)
