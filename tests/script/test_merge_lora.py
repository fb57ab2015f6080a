"""The command `merge_lora`: the folder it writes, Modelfiles, and what it refuses."""

import hashlib
import json
import shutil

import pytest
import torch
from merging import listing, load, logits, merged
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from utils.export.merge_folder import foreign_to_merge
from utils.infer.load import check_trained
from utils.script import merge_lora
from utils.storage.weights import weights_fingerprint


def test_the_files_of_a_merged_folder(lora_run, tmp_path):
    """Its exact files, in shards, with what it was merged of; base and run stay as they were."""
    base = lora_run.parent / "base"
    before = listing(base), listing(lora_run)
    (base / "tokenizer.model").write_bytes(b"SentencePiece")  # as bases for the converters have it
    try:
        whole = tmp_path / "whole"
        flags = ["--max_shard_size", "50KB", "--modelfile", "true"]
        merge_lora.main(["--model_path", str(lora_run), "--output_dir", str(whole), *flags])
    finally:
        (base / "tokenizer.model").unlink()
    assert (listing(base), listing(lora_run)) == before
    shards = {path.name for path in whole.glob("model-*.safetensors")}
    assert len(shards) > 3 and sum(path.stat().st_size > 60_000 for path in whole.glob("model-*")) <= 2
    assert {path.name for path in whole.iterdir()} - shards == {
        "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja", "tokenizer.model", "train_args.json", "merged.json",
        "Modelfile",
    }  # fmt: skip
    assert not [path for path in tmp_path.iterdir() if path != whole]
    index = json.loads((whole / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index.values()) == shards
    origin = json.loads((whole / "merged.json").read_text())
    assert origin["base"] == {
        "path": str(base),
        "fingerprint": weights_fingerprint(base),
    }
    sha256 = hashlib.sha256((lora_run / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert origin["adapters"] == [{"path": str(lora_run), "sha256": sha256}]
    assert origin["dtype"] == "float32" and origin["fingerprint"] == weights_fingerprint(whole)
    for name in ("chat_template.jinja", "tokenizer.json"):
        assert (whole / name).read_bytes() == (lora_run / name).read_bytes(), name
    stops = [
        json.loads((folder / "generation_config.json").read_text())["eos_token_id"] for folder in (whole, lora_run)
    ]
    assert stops[0] == stops[1] == [2, 0]
    text = (whole / "Modelfile").read_text(encoding="utf-8")
    assert 'PARAMETER stop "<|im_end|>"\nPARAMETER stop "<|endoftext|>"\n' in text
    assert 'SYSTEM """You are Qwen' in text  # the run's format, not the default one


def test_infer_and_training_take_a_merged_folder(lora_run, train, tmp_path, capsys):
    from utils.script import infer

    whole = tmp_path / "whole"
    merge_lora.main(["--model_path", str(lora_run), "--output_dir", str(whole)])
    flags = ["--prompt", "Hi", "--max_new_tokens", "8"]
    said = []
    for folder in (lora_run, whole):
        capsys.readouterr()
        infer.main(["--model_path", str(folder), *flags])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and said[0].strip()
    again = train(model=str(whole))
    assert json.loads((again / "train_args.json").read_text())["common"]["template_name"] == "qwen2.5"
    parts, problems = check_trained(merge_lora.MergeArgs(model_path=str(again)))
    assert not problems and parts.base == str(whole)


def test_an_adapter_without_a_runs_record(lora_copy):
    """Without a run's notes: the base's tokenizer and stops, the format of what is saved, or the one that is named."""
    for name in ("train_args.json", "generation_config.json"):
        (lora_copy / name).unlink()
    whole = merged(lora_copy, output="no-notes")
    assert json.loads((whole / "train_args.json").read_text()) == {"common": {"template_name": "qwen2.5"}}
    for path in [*lora_copy.glob("token*"), lora_copy / "chat_template.jinja"]:
        path.unlink()
    bare = merged(lora_copy, output="bare")
    assert AutoTokenizer.from_pretrained(bare).chat_template is None
    named = merged(lora_copy, "--template_name", "yi", "--modelfile", "true", output="named")
    assert AutoTokenizer.from_pretrained(named).eos_token == "<|im_end|>"
    assert json.loads((named / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
    assert json.loads((named / "train_args.json").read_text())["common"]["template_name"] == "yi"
    assert "SYSTEM" not in (named / "Modelfile").read_text()


def test_modelfile_for_a_model_without_adapter(lora_run, tmp_path, refused, monkeypatch):
    """For whole weights: written into their folder, with what the converters are told of the BOS, and nothing else."""
    whole = tmp_path / "whole"
    merge_lora.main(["--model_path", str(lora_run), "--output_dir", str(whole)])
    before = listing(whole)
    merge_lora.main(["--model_path", str(whole), "--modelfile", "true"])
    after = listing(whole)
    changed = {"Modelfile", "tokenizer_config.json", "merged.json"}  # the last lists the files of a merge
    assert {name for name in after if after[name] != before.get(name)} == changed
    assert foreign_to_merge(whole) == []
    assert "Modelfile already" in refused(merge_lora.main, "--model_path", str(whole), "--modelfile", "true")
    (whole / "checkpoint-1").mkdir()
    shutil.copy(whole / "model.safetensors", whole / "checkpoint-1")
    said = []
    monkeypatch.setattr(merge_lora.logger, "warning", lambda text, *more: said.append(text.format(*more)))
    merge_lora.main(["--model_path", str(whole), "--modelfile", "true", "--overwrite", "true"])
    assert "checkpoints" in said[0]
    assert listing(whole)["Modelfile"] == after["Modelfile"]


def test_whole_weights_and_a_format_that_go_cannot_express_are_refused(refused, lora_copy):
    said = refused(merge_lora.main, "--model_path", str(lora_copy.parent / "base"))
    assert "nothing to merge" in said and "--modelfile true" in said
    whole = ["--model_path", str(lora_copy.parent / "base"), "--modelfile", "true"]
    assert "is not saved with it" in refused(merge_lora.main, *whole)
    assert "--output_dir" in refused(merge_lora.main, *whole, "--output_dir", "x")
    (lora_copy / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}!{% endfor %}")
    out = lora_copy.parent / "merged"
    flags = ["--model_path", str(lora_copy), "--output_dir", str(out), "--modelfile", "true"]
    said = refused(merge_lora.main, *flags)
    assert "cannot be written in Go's syntax" in said and "--template_name" in said and "convert_hf_to_gguf.py" in said
    assert not out.exists()
    merge_lora.main(flags[:4])
    assert "!" in AutoTokenizer.from_pretrained(out).chat_template


@pytest.mark.parametrize(("flags", "told"), [
    ([], ["--model_path is missing"]),
    (["--model_path", "nowhere/at/all", "--max_shard_size", "5 gigs"], ["does not exist", "'5 gigs'", "5GB"]),
    (["--model_path", "EMPTY"], ["no config.json"]),
    (["--model_path", "RUN"], ["--output_dir is missing"]),
    (["--model_path", "RUN", "--output_dir", "RUN"], ["is or contains", "another folder"]),
    (["--model_path", "RUN", "--output_dir", "BASE"], ["is or contains"]),
    (["--model_path", "RUN", "--output_dir", "RUN/.."], ["is or contains"]),
    (["--model_path", "RUN", "--output_dir", "RUN/train.log"], ["is a file"]),
    (["--model_path", "RUN", "--output_dir", "FULL", "--overwrite", "true"], ["'notes.txt'", "no merge wrote"]),
    (["--model_path", "RUN", "--output_dir", "x", "--dtype", "float8"], ["'float8'", "bfloat16"]),
    (["--model_path", "RUN", "--output_dir", "x", "--outputdir", "y"], ["Did you mean '--output_dir'"]),
])  # fmt: skip
def test_refused_flags(flags, told, refused, lora_run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    names = {
        "RUN": lora_run,
        "BASE": lora_run.parent / "base",
        "EMPTY": tmp_path / "empty",
        "FULL": tmp_path / "full",
    }
    for name, path in names.items():
        flags = [flag.replace(name, str(path)) for flag in flags]
    said = refused(merge_lora.main, *flags)
    assert all(text in said for text in told)
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


def cut_off(run):
    file = run / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])


def not_finite(run):
    weights = load_file(run / "adapter_model.safetensors")
    weights[next(name for name in weights if "lora_B" in name)][0, 0] = float("nan")
    save_file(weights, run / "adapter_model.safetensors", metadata={"format": "pt"})


def other_base(run):
    file = run.parent / "base" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] += 1
    save_file(weights, file, metadata={"format": "pt"})


def without_a_weight(run):
    file = run.parent / "base" / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    (run / "train_args.json").unlink()  # which knows the base's fingerprint


def base_gone(run):
    (run.parent / "base").rename(run.parent / "elsewhere")


def quantised(run):
    file = run.parent / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))


def of_another_kind(run):
    file = run / "adapter_config.json"
    values = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 2}
    base = json.loads(file.read_text())["base_model_name_or_path"]
    file.write_text(json.dumps(values | {"base_model_name_or_path": base}))
    save_file({"prompt_embeddings": torch.zeros(2, 64)}, run / "adapter_model.safetensors")


@pytest.mark.parametrize(("damage", "told"), [
    (cut_off, ["adapter_model.safetensors is cut off", "copy or download it again"]),
    (not_finite, ["cannot be merged", "NaN", "checkpoint from before"]),
    (other_base, ["was trained on", "--base_model", "--allow_other_base"]),
    (without_a_weight, ["lacks weights", "up_proj"]),
    (base_gone, ["does not exist", "--base_model"]),
    (quantised, ["quantised (gptq)", "--base_model"]),
    (of_another_kind, ["PROMPT_TUNING", "cannot be merged"]),
])  # fmt: skip
def test_damaged_runs_are_refused(damage, told, refused, lora_copy, tmp_path):
    damage(lora_copy)
    said = refused(merge_lora.main, "--model_path", str(lora_copy), "--output_dir", str(tmp_path / "merged"))
    assert all(text in said for text in told), said
    assert not [path.name for path in tmp_path.iterdir() if "merged" in path.name]


def test_base_model_and_allow_other_base(lora_copy, tmp_path):
    wanted = logits(load(lora_copy.parent / "base", lora_copy))
    base_gone(lora_copy)
    elsewhere = lora_copy.parent / "elsewhere"
    whole = merged(lora_copy, "--base_model", str(elsewhere))
    torch.testing.assert_close(logits(load(whole)), wanted, rtol=1e-5, atol=1e-5)
    elsewhere.rename(lora_copy.parent / "base")
    other_base(lora_copy)
    other = merged(lora_copy, "--allow_other_base", "true", output="other")
    assert (logits(load(other)) - wanted).abs().max() > 1e-2
