"""Flags of merge_lora that need no weights to be checked."""

import json

import pytest

from utils.export.arguments import MergeArgs, check_merge
from utils.infer.load import Parts


@pytest.mark.parametrize("size", ["5GB", "500MB", "1TB", "20KB"])
def test_sizes_of_files(size):
    assert check_merge(MergeArgs(max_shard_size=size), None, False) == []


@pytest.mark.parametrize("size", ["5", "5 GB", "0GB", "1.5GB", "5gb", "5GiB", ""])
def test_what_is_no_size(size):
    (problem,) = check_merge(MergeArgs(max_shard_size=size), None, False)
    assert repr(size) in problem and "5GB or 500MB" in problem


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({}, "nothing to merge"),
        ({"modelfile": True}, None),
        ({"modelfile": True, "output_dir": "x"}, "--output_dir 'x' is for merging"),
        ({"modelfile": True, "dtype": "bfloat16"}, "--dtype 'bfloat16' is for merging"),
    ],
)
def test_full_weights_get_a_modelfile_and_nothing_else(flags, problem, tmp_path):
    found = check_merge(MergeArgs(model_path=str(tmp_path), **flags), Parts(str(tmp_path), ()), True)
    assert [problem in text for text in found] == [True] * (problem is not None)


def test_a_modelfile_is_replaced_only_with_overwrite(tmp_path):
    parts = Parts(str(tmp_path), ())
    (tmp_path / "Modelfile").touch()
    (problem,) = check_merge(MergeArgs(model_path="m", modelfile=True), parts, True)
    assert "--overwrite true" in problem
    assert check_merge(MergeArgs(model_path="m", modelfile=True, overwrite=True), parts, True) == []
    (problem,) = check_merge(MergeArgs(model_path="owner/name", modelfile=True), Parts("owner/name", ()), True)
    assert "is not a folder" in problem


def test_a_quantised_base_and_each_adapter_that_cannot_be_merged_are_named(tmp_path):
    for name, values in (("base", {"quantization_config": {"quant_method": "gptq"}}), ("a", {}), ("b", {})):
        (tmp_path / name).mkdir()
        file = "config.json" if name == "base" else "adapter_config.json"
        (tmp_path / name / file).write_text(json.dumps(values or {"peft_type": "PROMPT_TUNING"}))
    parts = Parts(str(tmp_path / "base"), (str(tmp_path / "a"), str(tmp_path / "b")))
    found = check_merge(MergeArgs(output_dir=str(tmp_path / "merged")), parts, False)
    assert len(found) == 3 and "quantised (gptq)" in found[0]
    assert repr(str(tmp_path / "a")) in found[1] and repr(str(tmp_path / "b")) in found[2]
