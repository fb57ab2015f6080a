"""Safetensors files looked at without loading them."""

import pytest
import torch
from safetensors.torch import save_file

from utils.storage.weights import check_weight_files, read_header, weights_fingerprint, weights_size

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def test_a_header_is_what_safetensors_says(tmp_path):
    from huggingface_hub import parse_local_safetensors_file_metadata

    file = tmp_path / "model.safetensors"
    save_file(WEIGHTS, file, metadata={"format": "pt"})
    header, start = read_header(file)
    theirs = parse_local_safetensors_file_metadata(file).tensors
    assert header.keys() == theirs.keys()
    for name, entry in header.items():
        assert (entry["dtype"], entry["shape"]) == (theirs[name].dtype, list(theirs[name].shape))
        assert tuple(entry["data_offsets"]) == tuple(theirs[name].data_offsets)
    begin, end = header["a"]["data_offsets"]
    assert file.read_bytes()[start + begin : start + end] == WEIGHTS["a"].numpy().tobytes()


@pytest.mark.parametrize("cut", [3, 20, -1])
def test_a_file_that_is_cut_off_is_refused(tmp_path, cut):
    file = tmp_path / "model.safetensors"
    save_file(WEIGHTS, file)
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ValueError, match="model.safetensors is"):
        read_header(file)
    (problem,) = check_weight_files("--model_name_or_path 'x'", tmp_path, "model_name_or_path")
    assert problem.flags == ("model_name_or_path",) and weights_fingerprint(tmp_path) is None


def test_a_size_in_its_own_type_and_in_another(tmp_path):
    save_file({"a": WEIGHTS["a"]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": WEIGHTS["b"]}, tmp_path / "model-00002-of-00002.safetensors")
    assert weights_size(tmp_path, None) == 6 * 4 + 4 * 2
    assert weights_size(tmp_path, "float32") == 10 * 4 and weights_size(tmp_path, "bfloat16") == 10 * 2


def test_a_fingerprint_is_of_the_weights_and_not_of_the_files(tmp_path):
    for name, weights in (("one", WEIGHTS), ("other", WEIGHTS | {"a": WEIGHTS["a"] + 1})):
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "model.safetensors")
    (tmp_path / "parts").mkdir()
    for number, (name, weight) in enumerate(WEIGHTS.items()):
        save_file({name: weight}, tmp_path / "parts" / f"model-{number}.safetensors")
    one, other, parts = (weights_fingerprint(tmp_path / name) for name in ("one", "other", "parts"))
    assert one == parts != other and len(one) == 16
