import json
from pathlib import Path

import gguf_files
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from utils.model import gguf as converting
from utils.model.gguf import conversion, gguf_folder, read_note, save_converted
from utils.model.source import made_folder, make_folder
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


def test_a_file_that_was_moved_is_named_by_its_new_path(cache, file):
    folder = make_folder(str(file))
    (file.parent / "new").mkdir()
    moved = file.rename(file.parent / "new" / "m.gguf")
    assert make_folder(str(moved)) == folder and read_note(folder)["model"] == str(moved)


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
