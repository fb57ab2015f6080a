"""Tensors of the base's files that a merged model lacks are named; tied weights and missing prefixes are not."""

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from utils.export import merge as merging
from utils.export.tensors import absent_tensors, main_type
from utils.script import merge_lora


def add_tensors(folder, **tensors):
    file = folder / "model.safetensors"
    save_file({**load_file(file), **tensors}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("prefix", ["model.", ""])
def test_only_tensors_that_are_not_loaded_are_absent(tied, prefix, tmp_path):
    base = tmp_path / "base"
    tiny.save_tiny_model(base, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(tmp_path / "saved")
    tensors = {
        name.replace("model.", prefix, 1): weight for name, weight in load_file(base / "model.safetensors").items()
    }
    tensors["lm_head.weight"] = torch.zeros(2)  # a copy of tied weights is in many files
    tensors[f"{prefix}layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert absent_tensors(model, tmp_path / "saved", str(base)) == []
    add_tensors(base, **{f"{prefix}layers.9.eh_proj.weight": torch.zeros(2)})
    assert absent_tensors(model, tmp_path / "saved", str(base)) == [f"{prefix}layers.9.eh_proj.weight"]


def test_a_merge_names_the_tensors_it_lacks(train, monkeypatch, tmp_path):
    base = tmp_path / "base"
    run = train(model=tiny.save_tiny_model(base))
    lines = []
    monkeypatch.setattr(merging.logger, "warning", lambda text, *values: lines.append(text.format(*values)))
    flags = ["--model_path", str(run), "--allow_other_base", "true", "--output_dir"]
    merge_lora.main([*flags, str(tmp_path / "plain")])
    assert not any("not in the merged model" in line for line in lines)
    add_tensors(base, **{f"mtp.{number}.weight": torch.zeros(2) for number in range(5)})
    merge_lora.main([*flags, str(tmp_path / "merged")])
    (line,) = [line for line in lines if "not in the merged model" in line]
    assert line.startswith("5 tensors of the base") and line.endswith("mtp.0.weight, mtp.1.weight, mtp.2.weight, …")
    assert not [name for name in load_file(tmp_path / "merged" / "model.safetensors") if "mtp" in name]


def test_the_main_dtype_is_that_of_most_bytes(tmp_path):
    assert main_type(tmp_path) is None
    save_file({"a": torch.zeros(3, dtype=torch.bfloat16), "b": torch.zeros(1), "c": torch.zeros(9, dtype=torch.int64)},
              tmp_path / "model.safetensors")  # fmt: skip
    assert main_type(tmp_path) == "bfloat16"
