import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import gguf_files
import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from utils.model import gguf as converting
from utils.model.gguf import conversion, gguf_folder, models_folder, read_note, save_converted
from utils.model.gguf_file import read_gguf
from utils.model.source import check_source, given_model, made_folder, make_folder
from utils.runtime.errors import UserError

gguf = pytest.importorskip("gguf")


def converted(tmp_path, kind="F32", **more):
    model, tokenizer = gguf_files.small_llama()
    file = gguf_files.write_gguf(tmp_path / "m.gguf", model, tokenizer, kind, **more)
    save_converted(file, tmp_path / "out")
    return model, tokenizer, AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto"), file


def test_a_converted_model_has_the_logits_of_the_one_the_file_was_made_from(tmp_path):
    model, tokenizer, found, _ = converted(tmp_path, template=gguf_files.CHAT_TEMPLATE)
    ids = torch.tensor([tokenizer("The quick brown fox jumps over 12 dogs.")["input_ids"]])
    assert found.dtype == torch.float32
    assert torch.equal(found(ids).logits, model(ids).logits)
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("Hello, you are 12 years old! 你好", "<|im_start|>user\nHi<|im_end|>\n", "  spaces\n\n\tand tabs"):
        assert saved(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert saved.chat_template == gguf_files.CHAT_TEMPLATE and saved.eos_token == "<|im_end|>"
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q5_0"])
def test_quantised_weights_are_those_that_the_gguf_package_dequantises(tmp_path, kind):
    *_, found, file = converted(tmp_path, kind)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    weights, heads = found.state_dict(), {"q": 4, "k": 2}
    for name, own in (("ffn_up", "mlp.up_proj"), ("attn_q", "self_attn.q_proj"), ("attn_k", "self_attn.k_proj")):
        tensor = tensors[f"blk.1.{name}.weight"]
        expected = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        if (head := heads.get(name[-1])) and name.startswith("attn"):
            pairs = expected.reshape(head, expected.shape[0] // head // 2, 2, -1)
            expected = pairs.transpose(1, 2).reshape(expected.shape)
        assert torch.equal(weights[f"model.layers.1.{own}.weight"], expected.bfloat16()), name


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["1", "ĊĊĊ", "Ġ5", "Ġ+", "Ġ17"]),
        ("smollm", ["1", "ĊĊĊĠ", "5", "Ġ+", "Ġ", "1", "7"]),  # each digit first, as llama.cpp does
    ],
)
def test_text_is_split_by_the_rule_that_the_file_names(tmp_path, pre, expected):
    converted(tmp_path, pre=pre)
    backend = AutoTokenizer.from_pretrained(tmp_path / "out").backend_tokenizer
    assert [text for text, _ in backend.pre_tokenizer.pre_tokenize_str("1\n\n\n 5 + 17")] == expected


@pytest.mark.parametrize(("kind", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_plain_numbers_keep_their_type(tmp_path, kind, dtype):
    model, *_, found, _ = converted(tmp_path, kind)
    assert found.dtype == dtype
    assert torch.equal(found.lm_head.weight, model.lm_head.weight.to(dtype))


@pytest.mark.parametrize(
    ("kind", "value", "dtype"),
    [
        ("F16", 1.0009765625, torch.float16),  # 1 + 2 ** -10
        ("F16", 1.0005, torch.float32),  # rounded in float16
        ("F16", 1e5, torch.float32),  # infinite in float16
        ("BF16", 1.0078125, torch.bfloat16),  # 1 + 2 ** -7
        ("BF16", 1.0009765625, torch.float32),
    ],
)
def test_float32_norms_are_kept_exactly(tmp_path, kind, value, dtype):
    model, tokenizer = gguf_files.small_llama()
    with torch.no_grad():
        model.model.norm.weight[3] = value
    save_converted(gguf_files.write_gguf(tmp_path / "m.gguf", model, tokenizer, kind), tmp_path / "out")
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert {weight.dtype for weight in weights.values()} == {dtype}
    assert torch.equal(weights["model.norm.weight"].float(), model.model.norm.weight)


def test_weights_of_both_16_bit_types_are_kept_as_float32(tmp_path):
    model, tokenizer = gguf_files.small_llama()
    file = read_gguf(gguf_files.write_gguf(tmp_path / "m.gguf", model, tokenizer, "F16"))
    assert file.dtype == "float16"
    (name, shape, kind, offset), *others = file.tensors
    assert kind == 1 and replace(file, tensors=((name, shape, 30, offset), *others)).dtype == "float32"


def test_the_rope_of_llama_3_is_read_from_its_factors(tmp_path):
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    model, tokenizer = gguf_files.small_llama(rope_parameters=rope, head_dim=64)
    scaled = model.model.rotary_emb.inv_freq
    plain = 500000.0 ** -(torch.arange(0, 64, 2).float() / 64)
    tensors = {"rope_freqs.weight": (plain / scaled).numpy()}
    file = gguf_files.write_gguf(tmp_path / "m.gguf", model, tokenizer, tensors=tensors)
    save_converted(file, tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(400)[None]
    assert torch.allclose(found.model.rotary_emb.inv_freq, scaled, rtol=1e-5)
    assert torch.allclose(found(ids).logits, model(ids).logits, atol=1e-5)


# ------------------------------------------------------------------ the cache


def wait_until(condition, seconds: float = 60) -> bool:
    """Whether a condition has become true within some seconds."""
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return bool(found)


def _in_process(path, given, folder, size):
    save_converted(Path(path), folder)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(converting, "_run_conversion", _in_process)
    return tmp_path / "hf" / "llm_dojo" / "models"


@pytest.fixture
def file(tmp_path):
    return gguf_files.write_gguf(tmp_path / "m.gguf", *gguf_files.small_llama())


def test_a_file_is_converted_once(cache, file, monkeypatch):
    assert made_folder(str(file)) == str(file)
    folder = make_folder(str(file))
    assert made_folder(str(file)) == folder and Path(folder).parent == cache
    monkeypatch.setattr(converting, "_run_conversion", None)
    assert make_folder(str(file)) == folder
    assert [path.name for path in cache.iterdir()] == [Path(folder).name]  # nothing temporary is kept
    note = read_note(folder)
    assert note["model"] == str(file) and note["dtype"] == "float32"
    assert Path(folder).name == f"m-{note['sha256'][:16]}"


@pytest.mark.parametrize("use", [make_folder, made_folder])
def test_a_file_that_was_moved_is_named_by_its_new_path(cache, file, monkeypatch, use):
    folder = make_folder(str(file))
    (file.parent / "new").mkdir()
    moved = file.rename(file.parent / "new" / "m.gguf")
    assert given_model(folder) == folder  # its old path leads nowhere
    monkeypatch.chdir(moved.parent)
    assert use("m.gguf") == folder and given_model(folder) == read_note(folder)["model"] == str(moved)


def test_a_copy_of_a_file_is_named_as_it_was_given(cache, file):
    folder = make_folder(str(file))
    (file.parent / "new").mkdir()
    copy = str(shutil.copy(file, file.parent / "new"))
    assert made_folder(copy) == folder and given_model(folder) == copy
    assert read_note(folder)["model"] == str(file)


def test_a_damaged_folder_is_made_again(cache, file):
    folder = Path(make_folder(str(file)))
    (folder / "model.safetensors").write_bytes(b"")
    assert made_folder(str(file)) == str(file)
    assert make_folder(str(file)) == str(folder) and read_note(folder) is not None


def test_a_failed_conversion_keeps_nothing(cache, file, monkeypatch):
    def fail(path, given, folder, size):
        save_converted(Path(path), folder)
        raise UserError("no")

    monkeypatch.setattr(converting, "_run_conversion", fail)
    with pytest.raises(UserError):
        make_folder(str(file))
    assert list(cache.iterdir()) == [] and made_folder(str(file)) == str(file)


def test_a_process_that_waited_finds_the_folder(cache, file):
    folder = gguf_folder(file)
    make_folder(str(file))
    with conversion(folder) as made:
        assert made is None


def test_a_relative_folder_of_the_cache_is_made_absolute(cache, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", "relative")
    monkeypatch.chdir(tmp_path)
    assert models_folder() == tmp_path / "relative" / "llm_dojo" / "models"


def test_a_conversion_that_wrote_no_model_is_refused(cache, file, monkeypatch):
    monkeypatch.setattr(converting, "_run_conversion", lambda *arguments: None)
    with pytest.raises(UserError) as refused:
        make_folder(str(file))
    assert "no model was written" in str(refused.value) and list(cache.iterdir()) == []


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_note_without_a_model_is_not_a_conversion(cache, file, missing):
    folder = Path(make_folder(str(file)))
    note = json.loads((folder / "source.json").read_text())
    del note["files"][missing]
    (folder / "source.json").write_text(json.dumps(note))
    assert read_note(folder) is None and made_folder(str(file)) == str(file)


def test_folders_of_killed_conversions_are_removed(cache, file):
    folder = gguf_folder(file)
    kill = f"""
import os, sys
from pathlib import Path
from utils.model.gguf import conversion
with conversion(Path({str(folder)!r})) as made:
    (made / "model.safetensors").write_bytes(b"x")
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", kill], cwd=ROOT).returncode == -9
    of_another_machine = cache / f".{folder.name}-elsewhere-1"
    of_another_machine.mkdir()
    assert len(list(cache.iterdir())) == 2
    make_folder(str(file))
    assert set(cache.iterdir()) == {folder, of_another_machine}


def test_the_name_of_a_file_may_be_long(cache, file):
    for name in (f"{'n' * 246}.gguf", f"{'长' * 80}.gguf"):
        assert read_note(make_folder(str(file.rename(file.with_name(name))))) is not None
        shutil.rmtree(cache)
        file = file.with_name(name)


def test_a_cache_that_cannot_be_written_is_refused(cache, file):
    cache.parent.parent.write_text("")  # a file where HF_HOME is to be a folder
    (problem,) = check_source("--model_name_or_path", str(file))
    assert "Not a directory" in str(problem) and "set HF_HOME" in str(problem)
    with pytest.raises(UserError) as refused:
        make_folder(str(file))
    assert "cannot be made" in str(refused.value)


@pytest.mark.slow
def test_the_converting_process_ends_with_its_parent(cache, tmp_path):
    os.mkfifo(tmp_path / "m.gguf")  # the child waits for its first byte for ever
    start = f"from utils.model.gguf import _run_conversion as run; run({str(tmp_path / 'm.gguf')!r}, 'm', 'out', 1)"
    parent = subprocess.Popen([sys.executable, "-c", start], cwd=ROOT)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    if not children.exists():
        pytest.skip("this system does not list the children of a process in /proc")
    try:
        assert wait_until(lambda: children.read_text().split())
        child = int(children.read_text().split()[0])
    finally:
        parent.kill()
        parent.wait()
    try:
        assert wait_until(lambda: _has_ended(child))
    finally:
        if not _has_ended(child):
            os.kill(child, signal.SIGKILL)


def _has_ended(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] == "Z"
    except OSError:
        return True


@pytest.mark.slow
def test_the_conversion_is_not_changed_by_a_launcher(tmp_path, file, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "ACCELERATE_USE_FSDP": "true"}.items():
        monkeypatch.setenv(name, value)
    folder = make_folder(str(file))
    found = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(found.lm_head.weight, gguf_files.small_llama()[0].lm_head.weight)


@pytest.mark.slow
def test_an_error_of_the_converting_process_is_told(tmp_path, file, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))
    with pytest.raises(UserError) as refused:
        converting._run_conversion(tmp_path / "missing.gguf", "missing.gguf", tmp_path / "out", 1)
    assert "missing.gguf cannot be converted to safetensors" in str(refused.value)
