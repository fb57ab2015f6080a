import re
import struct

import gguf_files
import numpy
import pytest

from utils.model.gguf_file import check_gguf, is_gguf, other_split, read_gguf
from utils.model.source import check_source

pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def llama():
    return gguf_files.small_llama()


@pytest.fixture
def write(llama, tmp_path):
    def make(tokenizer=llama[1], **more):
        return gguf_files.write_gguf(tmp_path / "m.gguf", llama[0], tokenizer, **more)

    return make


def problem(file) -> str:
    (found,) = check_gguf("--model_name_or_path", str(file))
    assert found.flags == ("model_name_or_path",)
    assert str(file) in str(found)
    return str(found)


def test_a_good_file_has_no_problem(write, llama):
    file = read_gguf(write(kind="Q4_0"))
    assert check_gguf("--model_name_or_path", str(file.path)) == []
    assert (file.architecture, file.dtype, file.chat_template) == ("llama", "bfloat16", None)
    assert file.weights == llama[0].num_parameters()


def test_a_file_is_known_by_its_first_bytes(write, tmp_path):
    blob = write().rename(tmp_path / "sha256-1234")  # as Ollama names them
    assert is_gguf(blob) and check_gguf("--model_name_or_path", str(blob)) == []
    (tmp_path / "no.gguf").write_bytes(b"PK12")
    assert not is_gguf(tmp_path / "no.gguf") and not is_gguf(tmp_path) and not is_gguf(tmp_path / "none")


@pytest.mark.parametrize("size", [5, 100, 2000])
def test_a_header_that_is_cut_off(write, size):
    file = write()
    file.write_bytes(file.read_bytes()[:size])
    assert "cut off or damaged" in problem(file)


def test_weights_that_are_cut_off(write):
    file = write()
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-4])
    assert f"it has {size - 4:,} bytes, and its header says {size:,}" in problem(file)


def test_a_version_that_is_not_known(write):
    file = write()
    file.write_bytes(file.read_bytes()[:4] + struct.pack("<I", 9) + file.read_bytes()[8:])
    assert "v9" in problem(file)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"architecture": "clip"}, "is a vision projector"),
        ({"settings": {"general.type": "mmproj"}}, "is a vision projector"),
        ({"settings": {"general.type": "adapter"}}, "is a LoRA adapter"),
        ({"settings": {"split.count": 3}}, "one of 3 parts .* llama-gguf-split --merge"),
        ({"architecture": "rwkv6"}, "the architecture 'rwkv6', and transformers reads .*llama, .*qwen3"),
        ({"tokenizer": None}, "has no tokenizer inside"),
        ({"settings": {"llama.rope.scaling.factor": 8.0}}, "does not read: rope.scaling.factor 8.0"),
        ({"settings": {"llama.rope.dimension_count": None, "llama.attention.key_length": 32}}, "key_length 32"),
        ({"settings": {"llama.logit_scale": 2.0}}, "does not read: logit_scale 2.0"),
        ({"tensors": {"rope_freqs.weight": numpy.linspace(1, 2, 8, dtype="f4")}}, "rope_freqs.weight"),
        ({"tensors": {"blk.0.attn_q.bias": numpy.zeros(64, "f4")}}, "some would be left out or missing"),
    ],
)
def test_a_file_that_transformers_cannot_read_as_it_is(write, more, expected):
    assert re.search(expected, problem(write(**more)))


def test_settings_that_agree_with_the_model_are_no_problem(write):
    file = write(settings={"llama.attention.key_length": 16, "llama.attention.value_length": 16})
    assert check_gguf("--model_name_or_path", str(file)) == []


def test_a_type_that_is_not_known(write, monkeypatch):
    file = write(kind="Q4_0")
    monkeypatch.setattr("utils.model.gguf_file._is_dequantised", lambda kind: kind == 8)
    assert re.search("is quantised as Q4_0, and transformers reads F32, F16, Q8_0, BF16", problem(file))


def test_a_missing_package(write, monkeypatch):
    file = write()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (found,) = check_source("--model_name_or_path", str(file))
    assert "pip install -r requirements.txt" in str(found)
    assert [str(each) for each in check_source("--model_name_or_path", "smollm2")] == [
        str(found).replace(str(file), "smollm2")
    ]


def test_a_way_of_splitting_text_that_transformers_lacks_is_named(write):
    assert other_split(read_gguf(write())) is None
    assert other_split(read_gguf(write(pre="qwen2"))) is None
    assert other_split(read_gguf(write(pre="smollm"))) is None
    assert other_split(read_gguf(write(pre="poro-chat"))) == "poro-chat"
