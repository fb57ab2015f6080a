"""Merging for tests: models as a user loads them, their logits, and a run to merge."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from conftest import write_rows
from peft import PeftModel
from transformers import AutoModelForCausalLM

import main_train
from utils.script import merge_lora

IDS = torch.arange(5, 25)[None]


def logits(model):
    with torch.inference_mode():
        return model.eval().float()(IDS).logits


def load(folder, *adapters, dtype=torch.float32):
    """As a user without this project loads a model, or a base with adapters on it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    for number, adapter in enumerate(adapters, 1):
        model = PeftModel.from_pretrained(model, adapter)
        model = model if number == len(adapters) else model.merge_and_unload()
    return model


def merged(folder, *flags, output="merged"):
    output = folder.parent / output
    merge_lora.main(["--model_path", str(folder), "--output_dir", str(output), *flags])
    return output


def check_merge(base, folder):
    """Merges a run; its logits are the adapter's on the base that is not quantised, in float32 to 1e-5."""
    whole = merged(folder)
    wanted = logits(load(base, folder))
    torch.testing.assert_close(logits(load(whole)), wanted, rtol=1e-5, atol=1e-5)
    assert (wanted - logits(load(base))).abs().max() > 1e-2
    config = json.loads((whole / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    of_base = json.loads((Path(base) / "config.json").read_text())
    assert config["tie_word_embeddings"] == of_base["tie_word_embeddings"]
    assert not (whole / "adapter_config.json").exists()


@pytest.fixture(scope="session")
def lora_run(tmp_path_factory):
    """A run with an adapter that moved its base, `folder/run` on `folder/base`; read, never written."""
    folder = tmp_path_factory.mktemp("merge")
    flags = ["--model_name_or_path", tiny.save_tiny_model(folder / "base"), "--output_dir", str(folder / "run")]
    rows = write_rows(folder / "rows.jsonl", tiny.ROWS)
    main_train.main([
        *flags, "--train_data_path", rows, "--learning_rate", "1e-2", "--num_train_epochs", "4", "--precision", "fp32",
        "--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "true", "--template_name", "qwen2.5",
    ])  # fmt: skip
    return folder / "run"


@pytest.fixture
def lora_copy(lora_run, tmp_path):
    """A copy of that run with its base, to be changed; returns the run's folder."""
    shutil.copytree(lora_run.parent, tmp_path / "copy")
    config = json.loads((lora_run / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "copy" / "base")
    (tmp_path / "copy" / "run" / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path / "copy" / "run"


def listing(folder):
    """Every file below a folder, with its content's hash."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
