"""Merged weights: the adapter's own logits, rounded once, and only where there is room for them."""

import importlib.machinery
import json
import shutil
import sys
import types

import pytest
import tiny
import torch
from conftest import write_rows
from merging import check_merge, listing, load, logits, merged
from modes import MODES, base_with_untrained
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from benchmarks.architectures_models import SWITCHES
from utils.export import merge as merging
from utils.model.merge_layers import merge_onto
from utils.model.small import small_model
from utils.runtime.errors import UserError
from utils.script import merge_lora
from utils.storage.weights import weights_fingerprint


def test_a_merged_model_with_tied_embeddings_has_the_adapters_logits(train, tiny_models):
    """Every other base and kind of adapter: tests/run/test_save.py, with the run that it trains."""
    base = tiny_models(tie_word_embeddings=True)
    check_merge(base, train("--precision", "fp32", "--learning_rate", "1e-2", model=base))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["lora", "dora", "qlora"])
def test_trained_token_rows_are_merged(tied, kind, train, tmp_path, tokenizer):
    tokens = tokenizer.convert_tokens_to_ids(tiny.CHAT_TOKENS)
    base = base_with_untrained(tmp_path / "base", tokenizer, tokens, "drift", tied)
    folder = train("--precision", "fp32", "--learning_rate", "1e-2", *MODES[kind], model=base)
    whole = load(merged(folder))
    torch.testing.assert_close(logits(whole), logits(load(base, folder)), rtol=1e-5, atol=1e-5)
    for layer in ("get_input_embeddings", "get_output_embeddings"):
        moved = (getattr(whole, layer)().weight - getattr(load(base), layer)().weight).abs().sum(-1) > 0
        assert torch.nonzero(moved).flatten().tolist() == sorted(tokens), layer
    assert (whole.get_input_embeddings().weight is whole.get_output_embeddings().weight) == tied


def test_sft_then_dpo_then_merged(train, tiny_models, tmp_path):
    """DPO goes on with the SFT run's adapter, so that its own on the base is the whole of it."""
    base, first = tiny_models(), train("--learning_rate", "1e-2", "--precision", "fp32", output="sft")
    pairs = write_rows(tmp_path / "pairs.jsonl", tiny.PAIRS)
    second = train(
        "--train_args_path", "train_args/dpo/base.py", "--adapter_name_or_path", str(first), "--precision", "fp32",
        "--learning_rate", "1e-2", model=base, data=pairs, output="dpo",
    )  # fmt: skip
    whole = logits(load(merged(second)))
    torch.testing.assert_close(whole, logits(load(base, second)), rtol=1e-5, atol=1e-5)
    assert (whole - logits(load(merged(first, output="first")))).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_chain_of_adapters_is_merged_in_order(kind, lora_run, train):
    base, middle = lora_run.parent / "base", merged(lora_run, output=f"middle-{kind}")
    flags = ["--learning_rate", "1e-2", "--precision", "fp32", "--template_name", "qwen2.5", *MODES[kind]]
    second = train(*flags, model=str(middle))
    wanted = logits(load(middle, second))
    torch.testing.assert_close(wanted, logits(load(base, lora_run, second)), rtol=1e-5, atol=1e-5)
    by_base = merged(base, "--adapter", f"{lora_run},{second}", output=f"by-base-{kind}")
    by_middle = merged(second)
    for whole in (by_base, by_middle):
        torch.testing.assert_close(logits(load(whole)), wanted, rtol=1e-5, atol=1e-5)
    origin = json.loads((by_base / "merged.json").read_text())
    assert [adapter["path"] for adapter in origin["adapters"]] == [str(lora_run), str(second)]
    # an adapter whose recorded base is an adapter itself
    config = json.loads((second / "adapter_config.json").read_text())
    (second / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(lora_run)}))
    assert weights_fingerprint(merged(second, output="by-adapter")) == weights_fingerprint(by_base)


def test_a_bf16_base_is_merged_in_float32_and_rounded_once(tmp_path, monkeypatch):
    """Nearer to the exact weights than PEFT's safe merge in bf16, which rounds twice; what rounding costs is said."""
    base = tiny.save_tiny_model(tmp_path / "base", hidden_size=128, intermediate_size=256)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    model = get_peft_model(load(base), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    said = []
    monkeypatch.setattr(merge_lora.logger, "info", lambda text, *more: said.append(text.format(*more)))
    whole = merged(tmp_path / "adapter")
    exact = dict(load(base, tmp_path / "adapter").merge_and_unload().named_parameters())
    rough = load(base, tmp_path / "adapter", dtype=torch.bfloat16).merge_and_unload(safe_merge=True)
    saved = load_file(whole / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.bfloat16}
    for name, weight in saved.items():
        assert torch.equal(weight, exact[name].bfloat16()), name

    def distance(weights):
        return sum((weight.float() - exact[name]).square().sum() for name, weight in weights)

    layers = [name for name in exact if "proj" in name]
    assert distance((name, saved[name]) for name in layers) < 0.9 * distance(
        (name, weight) for name, weight in rough.named_parameters() if name in layers
    )
    before = dict(load(base).named_parameters())
    lost = sum((saved[name].float() - exact[name]).square().sum() for name in layers)
    share = (lost / sum((exact[name] - before[name]).square().sum() for name in layers)) ** 0.5
    (told,) = (text for text in said if "rounding" in text)
    assert f"rounding to bfloat16 moved the merged weights by {100 * share:.2g} % of what training" in told
    said.clear()
    kept = merged(tmp_path / "adapter", "--dtype", "float32", output="float32")
    torch.testing.assert_close(logits(load(kept)), logits(load(base, tmp_path / "adapter")), rtol=1e-5, atol=1e-5)
    assert not any("rounding" in text for text in said)


def test_a_chain_on_a_bf16_base_is_rounded_once_at_the_end(tmp_path):
    """W + s B₁A₁ + s B₂A₂ in float32, by hand: not rounded after the first adapter as well."""
    base = tiny.save_tiny_model(tmp_path / "base", hidden_size=128, intermediate_size=256)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    torch.manual_seed(0)
    for name in ("first", "second"):
        model = get_peft_model(load(base), LoraConfig(r=4, lora_alpha=8, target_modules=["up_proj"]))
        for weight in (weight for part, weight in model.named_parameters() if "lora_B" in part):
            torch.nn.init.normal_(weight, std=0.1)
        model.save_pretrained(tmp_path / name)
    merge_lora.main(["--model_path", base, "--adapter", f"{tmp_path}/first,{tmp_path}/second", "--output_dir",
                     str(tmp_path / "whole")])  # fmt: skip
    saved, before = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "base"))
    adapters = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second")]
    for layer in ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"):
        exact = before[f"{layer}.weight"].float()
        for adapter in adapters:
            a, b = (adapter[f"base_model.model.{layer}.lora_{part}.weight"] for part in "AB")
            exact = exact + 2.0 * b @ a
        wrong = saved[f"{layer}.weight"] != exact.bfloat16()
        assert wrong.float().mean() < 1e-3  # a sum in another order may fall on the other side of a half


def test_adapters_of_layers_that_share_a_weight_are_refused(tmp_path):
    """Zamba's blocks are one, and PEFT gives each its own adapter."""
    model = small_model(CONFIG_MAPPING["zamba"](**SWITCHES["zamba"]))
    options = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    get_peft_model(model, LoraConfig(**options)).save_pretrained(tmp_path / "adapter")
    base = small_model(CONFIG_MAPPING["zamba"](**SWITCHES["zamba"]))
    with pytest.raises(UserError, match="q_proj and .*q_proj share one weight of the base"):
        merge_onto(base, str(tmp_path / "adapter"), "--model_path", None)


def test_weights_too_large_for_fp16_are_refused(refused, lora_copy, tmp_path):
    weights = load_file(lora_copy / "adapter_model.safetensors")
    for name, weight in weights.items():
        weight.zero_()
        if "layers.1.self_attn.v_proj.lora" in name:
            weight[0, 0] = 400  # one weight of 160,000 or more
    save_file(weights, lora_copy / "adapter_model.safetensors", metadata={"format": "pt"})
    flags = ["--model_path", str(lora_copy), "--output_dir", str(tmp_path / "merged")]
    assert "bfloat16" in refused(merge_lora.main, *flags, "--dtype", "float16")
    merge_lora.main([*flags, "--dtype", "bfloat16"])
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_full_disk_is_reported_before_the_merge(dtype, refused, lora_run, tmp_path, monkeypatch):
    size = sum(path.stat().st_size for path in (lora_run.parent / "base").glob("*.safetensors")) / (2 if dtype else 1)
    flags = [
        "--model_path",
        str(lora_run),
        "--output_dir",
        str(tmp_path / "merged"),
        *(["--dtype", dtype] if dtype else []),
    ]
    monkeypatch.setattr(merging, "load_merged", lambda *_: pytest.fail("loaded"))
    room = {"free": 0.9 * size}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), room))
    said = refused(merge_lora.main, *flags)
    assert "GB free" in said and "free some space" in said
    room["free"] = 1.1 * size
    merge_lora.parse(flags)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("bug")])
def test_a_failed_merge_leaves_the_folder_as_it_was(error, refused, lora_run, tmp_path, monkeypatch):
    flags = ["--model_path", str(lora_run), "--output_dir", str(tmp_path / "merged")]
    merge_lora.main(flags)
    assert "--overwrite true" in refused(merge_lora.main, *flags)
    before = listing(tmp_path)
    fails = lambda *_: (_ for _ in ()).throw(error)  # noqa: E731
    for name in ("_write_merge_record", "_write_settings"):
        with monkeypatch.context() as patched:
            patched.setattr(merging, name, fails)
            if isinstance(error, OSError):
                assert "No space left" in refused(merge_lora.main, *flags, "--overwrite", "true")
            else:
                with pytest.raises(type(error)):
                    merge_lora.main([*flags, "--overwrite", "true"])
        assert listing(tmp_path) == before and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "merged" / "model.gguf").write_text("mine")
    said = refused(merge_lora.main, *flags, "--overwrite", "true")
    assert "holds 'model.gguf', which no merge wrote" in said and "move it" in said
    (tmp_path / "merged" / "model.gguf").unlink()
    merge_lora.main([*flags, "--overwrite", "true"])
    assert listing(tmp_path).keys() == before.keys() and len(list(tmp_path.iterdir())) == 1


def test_merging_does_not_import_deepspeed(trained, tmp_path, monkeypatch):
    """What is merged is saved, for which accelerate would import it: seconds, and a warning of its own."""
    import accelerate.utils.imports
    import accelerate.utils.other

    folder, asked = trained(), []

    class Watched(types.ModuleType):
        def __getattr__(self, name):
            if name == "DeepSpeedEngine":
                asked.append(name)
                return type(name, (), {})
            raise AttributeError(name)

    module = Watched("deepspeed")
    module.__spec__ = importlib.machinery.ModuleSpec("deepspeed", None)
    monkeypatch.setitem(sys.modules, "deepspeed", module)
    # as in a process that has not trained
    found = accelerate.utils.imports.is_deepspeed_available
    monkeypatch.setattr(accelerate.utils.other, "is_deepspeed_available", found)
    merge_lora.main(["--model_path", str(folder), "--output_dir", str(tmp_path / "merged")])
    assert (tmp_path / "merged" / "model.safetensors").is_file() and not asked
