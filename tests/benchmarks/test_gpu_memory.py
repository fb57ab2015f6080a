"""benchmarks/gpu_memory.py: its own logic, on the CPU; the GPU's figures are measured, not asserted."""

import json

import pytest
from conftest import ROOT

from benchmarks import gpu_memory


@pytest.mark.slow
@pytest.mark.usefixtures("fast_processes")
def test_the_script_measures_a_tiny_shape(tmp_path, capsys):
    output = tmp_path / "found.json"
    ways = ["LoRA", "LoRA + ZeRO-2"]
    gpu_memory.main(
        [
            "--shape",
            "tiny",
            "--device",
            "cpu",
            "--tokens",
            "128",
            "--steps",
            "2",
            "--output",
            str(output),
            "--ways",
            *ways,
        ]
    )
    results = json.loads(output.read_text(encoding="utf-8"))
    assert [run["way"] for run in results["runs"]] == ways
    assert all(run["peak_gb"] > 0.1 and run["tokens_per_second"] > 0 for run in results["runs"]), results
    assert capsys.readouterr().out.count('{"way"') == 2


@pytest.mark.slow
def test_a_way_that_fails_is_said_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu_memory.WAYS, "LoRA", (["--lora_rank", "0"], None, None))
    gpu_memory.make_rows(tmp_path / "rows.jsonl", 64, 1)
    found = gpu_memory.measure("LoRA", ROOT / "data" / "tiny_model", tmp_path / "rows.jsonl", 64, 1, tmp_path)
    assert "--lora_rank 0 is not allowed" in found["failed"]


@pytest.mark.skipif("not __import__('torch').cuda.is_available()", reason="no GPU here")
@pytest.mark.gpu
def test_the_goals_on_a_gpu(tmp_path):
    gpu_memory.main(["--output", str(tmp_path / "found.json"), "--steps", "3"])
    for run in json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["runs"]:
        goal = gpu_memory.WAYS[run["way"]][2]
        assert goal is None or run["peak_gb"] <= goal


def test_the_pages_table_is_what_was_measured():
    file = ROOT / "benchmarks" / "gpu_memory.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    assert gpu_memory.table(results) in (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    if results is None:
        assert gpu_memory.table(None).count("not measured") == 2 * len(gpu_memory.WAYS)


def test_the_shape_has_seven_billion_weights():
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen2Config(**gpu_memory.SHAPES["qwen1.5-7b"]))
    assert model.num_parameters() == 7_721_324_544  # the hub says 7.72B
