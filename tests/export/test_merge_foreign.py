"""Adapters made with plain PEFT, of every kind: merged, used and trained further as PEFT computes them, or refused."""

import copy
import json
from types import SimpleNamespace

import peft
import pytest
import tiny
import torch
from merging import load, logits
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from utils.export import merge as merging
from utils.infer.load import Parts, TrainedArgs, load_trained
from utils.model import merge_check
from utils.model.load import with_trained_adapter
from utils.runtime.errors import UserError
from utils.script import merge_lora

LAYERS = ["q_proj", "up_proj"]


def make_adapter(base, folder, config, rows=None, seed=0):
    """An adapter that moves its base, saved by PEFT; `rows` resizes the vocabulary first, as for new tokens."""
    torch.manual_seed(seed)
    model = load(base)
    if rows:
        model.resize_token_embeddings(rows)
    model = get_peft_model(model, copy.deepcopy(config))  # which PEFT changes
    for name, weight in model.named_parameters():
        if weight.requires_grad or "modules_to_save" in name:
            weight.data += 0.05 * torch.randn_like(weight)
    model.save_pretrained(folder)
    return None if config.peft_type == "PROMPT_TUNING" or getattr(config, "layer_replication", None) else logits(model)


def merge(folder, output, *flags):
    merge_lora.main(["--model_path", str(folder), "--output_dir", str(output), *flags])
    return output


def lora(*targets, **more):
    return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=list(targets) or LAYERS, **more)


ON_THE_VOCABULARY = {
    "lora on the head": lora("q_proj", "lm_head"),
    "lora on the embedding": lora("q_proj", "embed_tokens"),
    "lora on both": lora("q_proj", "embed_tokens", "lm_head"),
    "lora on both, tied": lora("q_proj", "embed_tokens", ensure_weight_tying=True),
    "dora on the head": lora("q_proj", "lm_head", use_dora=True),
    "the head saved": lora("q_proj", modules_to_save=["lm_head"]),
    "the embedding saved": lora("q_proj", modules_to_save=["embed_tokens"]),
    "both saved": lora("q_proj", modules_to_save=["embed_tokens", "lm_head"]),
    "rows of the embedding": lora("q_proj", trainable_token_indices=[3, 7]),
}
KINDS = {
    "dora": lora(use_dora=True),
    "rslora": lora(use_rslora=True, lora_alpha=16),
    "biases": lora(bias="all"),
    "patterns": lora(rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 32}, layers_to_transform=[1]),
    "pissa": lora(init_lora_weights="pissa"),
    "olora": lora(init_lora_weights="olora"),
    "ia3": peft.IA3Config(task_type="CAUSAL_LM", target_modules=LAYERS, feedforward_modules=["up_proj"]),
    "loha": peft.LoHaConfig(task_type="CAUSAL_LM", r=4, target_modules=LAYERS),
    "lokr": peft.LoKrConfig(task_type="CAUSAL_LM", r=4, target_modules=LAYERS),
    "vera": peft.VeraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]),
    "oft": peft.OFTConfig(task_type="CAUSAL_LM", oft_block_size=16, target_modules=["q_proj"]),
    "tokens": peft.TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[3, 7]),
}
PROBLEMS = {
    "prompt": (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "PROMPT_TUNING"),
    "alora": (lora(alora_invocation_tokens=[5]), "activated LoRA"),
    "replicated": (lora(layer_replication=[[0, 2], [1, 2]]), "layer_replication"),
}


@pytest.mark.parametrize("kind", ON_THE_VOCABULARY)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
def test_an_adapter_on_the_vocabulary(kind, tied, tiny_models, tmp_path):
    """The merged files, what infer loads, and what `--train_mode full` starts from give PEFT's logits."""
    base = tiny_models(tie_word_embeddings=tied)
    wanted = make_adapter(base, tmp_path / "adapter", ON_THE_VOCABULARY[kind])
    assert (wanted - logits(load(base))).abs().max() > 0.05
    whole = merge(tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(logits(load(whole)), wanted, rtol=1e-4, atol=1e-4)
    args = SimpleNamespace(adapter_name_or_path=str(tmp_path / "adapter"), train_mode="full", model_name_or_path=base)
    start = with_trained_adapter(load(base), args)
    torch.testing.assert_close(logits(start), wanted, rtol=1e-4, atol=1e-4)
    spoken = load_trained(TrainedArgs(), Parts(base, (str(tmp_path / "adapter"),)), torch.float32)
    torch.testing.assert_close(logits(spoken), wanted, rtol=1e-4, atol=1e-4)
    # other loaders believe the config
    config = json.loads((whole / "config.json").read_text())
    apart = "lm_head.weight" in load_file(whole / "model.safetensors")
    assert config["tie_word_embeddings"] is not apart
    start.save_pretrained(tmp_path / "start")
    torch.testing.assert_close(logits(load(tmp_path / "start")), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_each_kind_is_merged_used_and_trained(kind, tiny_models, tmp_path):
    base = tiny_models(attention_bias=True, architecture="llama")
    wanted = make_adapter(base, tmp_path / "adapter", KINDS[kind])
    moved = (wanted - logits(load(base))).abs().max()
    whole = merge(tmp_path / "adapter", tmp_path / "merged")
    assert (logits(load(whole)) - wanted).abs().max() < 0.01 * moved
    assert moved > 1e-4


def test_the_base_is_loaded_by_the_class_of_the_task(tmp_path, monkeypatch):
    """Which the run's record names; an adapter from elsewhere is one of a causal language model."""
    record = {"common": {"task_type": "labelled"}}
    (tmp_path / "train_args.json").write_text(json.dumps(record), encoding="utf-8")
    monkeypatch.setattr(merging, "TASKS", {"labelled": SimpleNamespace(auto_class="AutoModelForTokenClassification")})
    found = [merging.auto_class_of(Parts("base", (str(folder),))) for folder in (tmp_path, tmp_path / "elsewhere")]
    assert [kind.__name__ for kind in found] == ["AutoModelForTokenClassification", "AutoModelForCausalLM"]


@pytest.mark.parametrize("kind", PROBLEMS)
def test_adapters_that_do_not_change_weights_are_refused(kind, tiny_models, tmp_path, refused, monkeypatch):
    config, told = PROBLEMS[kind]
    make_adapter(tiny_models(), tmp_path / "adapter", config)
    monkeypatch.setattr(merging, "load_merged", lambda *_: pytest.fail("loaded"))
    flags = ["--model_path", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "merged")]
    said = refused(merge_lora.main, *flags)
    assert told in said and "cannot be merged" in said


def test_an_adapter_that_peft_cannot_merge_is_refused(tiny_models, tmp_path, refused):
    """Rows of single tokens, which both tied layers share, and LoRA on one of them."""
    config = lora("q_proj", "lm_head", trainable_token_indices={"embed_tokens": [3, 7]})
    make_adapter(tiny_models(tie_word_embeddings=True), tmp_path / "adapter", config)
    flags = ["--model_path", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "merged")]
    said = refused(merge_lora.main, *flags)
    assert "cannot be merged" in said and "lm_head" in said and not (tmp_path / "merged").exists()


@pytest.mark.parametrize("rows", [+4, -4])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
@pytest.mark.parametrize("saved", [[], ["embed_tokens", "lm_head"]], ids=["layers", "modules"])
def test_the_base_gets_the_vocabulary_of_the_adapter(rows, tied, saved, tiny_models, tmp_path, tokenizer):
    base, rows = tiny_models(tie_word_embeddings=tied), len(tokenizer) + rows
    wanted = make_adapter(base, tmp_path / "adapter", lora(modules_to_save=saved or None), rows)
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name: len(held[name]) for name in held if "embed_tokens" in name}
    whole = merge(tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(logits(load(whole)), wanted, rtol=1e-4, atol=1e-4)
    assert json.loads((whole / "config.json").read_text())["vocab_size"] == rows
    spoken = load_trained(TrainedArgs(), Parts(base, (str(tmp_path / "adapter"),)), torch.float32)
    torch.testing.assert_close(logits(spoken), wanted, rtol=1e-4, atol=1e-4)


def test_a_resized_vocabulary_that_the_adapter_does_not_hold_is_refused(tiny_models, tmp_path, refused):
    base = tiny_models()
    make_adapter(base, tmp_path / "adapter", lora(), rows=600)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    held = {name: value for name, value in load_file(file).items() if "lm_head" not in name}
    save_file(held, file, metadata={"format": "pt"})
    flags = ["--model_path", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "merged")]
    said = refused(merge_lora.main, *flags)
    assert "600 rows" in said and "save_pretrained" in said and not (tmp_path / "merged").exists()


def test_an_adapter_for_other_module_names_is_refused(tiny_models, tmp_path, refused):
    make_adapter(tiny_models(), tmp_path / "adapter", lora())
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    held = {name.replace("model.layers", "model.blocks"): value for name, value in load_file(file).items()}
    save_file(held, file, metadata={"format": "pt"})
    flags = ["--model_path", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "merged")]
    assert "model.blocks" in refused(merge_lora.main, *flags)
    with pytest.raises(UserError, match=r"model\.blocks"):
        load_trained(TrainedArgs(), Parts(tiny_models(), (str(tmp_path / "adapter"),)), torch.float32)


@pytest.mark.parametrize("where", ["layers", "files"])
def test_a_merge_with_different_logits_is_refused_and_writes_nothing(
    where, tiny_models, tmp_path, refused, monkeypatch
):
    """A fault on purpose: once in memory, once between saving and loading."""
    base = tiny_models(tie_word_embeddings=True)
    make_adapter(base, tmp_path / "adapter", lora("q_proj", "lm_head"))
    if where == "layers":
        monkeypatch.setattr("utils.model.merge_layers.separate_head", lambda peft: False)
    else:
        monkeypatch.setattr(merging, "keep_types", lambda part, *_: spoil(part / "model.safetensors"))
    flags = ["--model_path", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "merged")]
    said = refused(merge_lora.main, *flags)
    assert "other logits" in said and ("loaded from its files" in said) == (where == "files")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_base_that_cannot_run_here_is_merged_with_a_warning(tiny_models, tmp_path, monkeypatch):
    wanted = make_adapter(tiny_models(), tmp_path / "adapter", lora())
    told = []
    monkeypatch.setattr(merge_check.logger, "warning", lambda text, *more: told.append(text.format(*more)))
    monkeypatch.setattr(merge_check, "logits_in_float32", lambda *_: torch.empty(1).cuda())
    whole = merge(tmp_path / "adapter", tmp_path / "merged")
    assert "cannot be compared" in told[0]
    torch.testing.assert_close(logits(load(whole)), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lost", [True, False])
def test_a_small_adapter_on_a_bf16_base_is_lost_or_rounded(lost, tiny_models, tmp_path, refused, monkeypatch):
    """Rounding takes most of what it changes, which is a warning; a merge that adds nothing is refused."""
    base = tiny.save_tiny_model(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    model = get_peft_model(load(base), lora())
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data += 5e-5 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "adapter")
    flags = ["--model_path", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "merged")]
    said = []
    monkeypatch.setattr(merge_lora.logger, "warning", lambda text, *more: said.append(text.format(*more)))
    if lost:
        monkeypatch.setattr(peft.tuners.lora.Linear, "merge", lambda *args, **kwargs: None)
        assert "of what the adapter changes" in refused(merge_lora.main, *flags)
        assert not (tmp_path / "merged").exists()
        return
    merge_lora.main(flags)
    assert any("rounding to bfloat16 moved" in text for text in said)
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def spoil(file):
    weights = load_file(file)
    weights["lm_head.weight"] *= 1.1
    save_file(weights, file, metadata={"format": "pt"})


def test_the_largest_difference_is_logged(tiny_models, tmp_path, monkeypatch):
    wanted = make_adapter(tiny_models(), tmp_path / "adapter", lora())
    said = []
    monkeypatch.setattr(merge_lora.logger, "info", lambda text, *more: said.append(text.format(*more)))
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert any("largest difference of a logit is" in text and "up to" in text for text in said)
    assert wanted.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_in_float32_equal_those_of_a_float32_model(dtype, tiny_models, tmp_path):
    """Of a model in bf16 with DoRA, trained rows and a mixture's experts; its weights stay as they were."""
    for architecture, config in (
        ("qwen2", lora("q_proj", "lm_head", use_dora=True, trainable_token_indices={"embed_tokens": [1, 2]})),
        ("qwen3_moe", lora("q_proj", target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])),
    ):
        base = tiny_models(
            architecture,
            **(
                {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
                if "moe" in architecture
                else {}
            ),
        )
        make_adapter(base, tmp_path / architecture, config)
        low = load(base, tmp_path / architecture, dtype=dtype).eval()
        before = {name: weight.clone() for name, weight in low.state_dict().items()}
        ids = merge_check.probe_ids(low.get_base_model())
        found = merge_check.logits_in_float32(low, ids)
        after = low.state_dict()
        assert all(after[name].dtype == before[name].dtype and after[name].equal(before[name]) for name in before)
        with torch.inference_mode():
            torch.testing.assert_close(found, low.float()(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def mixed_base(folder, architecture="qwen3_moe"):
    """A mixture in bf16 whose routers and norms lie in float32 in its files."""
    tiny.save_tiny_model(folder, architecture, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if "norm" in name or name.endswith("mlp.gate.weight"):
            weights[name] = weights[name].float() + 1e-4 * torch.randn(weights[name].shape)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


WIDE = {
    "deepseek_v3": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32,
        "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16, "v_head_dim": 16, "n_shared_experts": 1, "num_key_value_heads": 4,
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": None, "sliding_window": 8},
}  # fmt: skip


@pytest.mark.parametrize("architecture", WIDE)
def test_float32_weights_of_a_mixture_stay_float32(architecture, tmp_path):
    """The balance of a router, its bias and the sinks of attention, in files of bf16."""
    tiny.save_tiny_model(tmp_path / "base", architecture, **WIDE[architecture])
    AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    weights = load_file(file)
    wide = [name for name in weights if name.endswith(("e_score_correction_bias", "sinks", "router.bias"))]
    assert wide
    for name in wide:
        weights[name] = torch.randn(weights[name].shape)
    save_file(weights, file, metadata={"format": "pt"})
    make_adapter(tmp_path / "base", tmp_path / "adapter", lora("o_proj"))
    after = bits(merge(tmp_path / "adapter", tmp_path / "merged") / "model.safetensors")
    assert after.keys() == weights.keys()
    for name, weight in weights.items():
        assert after[name].dtype == weight.dtype
        assert after[name].equal(weight) == ("o_proj.weight" not in name), name


def bits(file):
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_unchanged_weights_keep_their_bits_and_dtype(dtype, tmp_path):
    """And a router that is adapted keeps its type, merged from its own float32 values."""
    base = mixed_base(tmp_path / "base")
    config = lora("q_proj", "gate")
    make_adapter(base, tmp_path / "adapter", config)
    whole = merge(tmp_path / "adapter", tmp_path / "merged", *(["--dtype", dtype] if dtype else []))
    exact = load(base, tmp_path / "adapter").merge_and_unload().state_dict()
    before, after = bits(tmp_path / "base" / "model.safetensors"), bits(whole / "model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        usual = weight.dtype == torch.bfloat16
        wanted = getattr(torch, dtype) if dtype and usual else weight.dtype
        assert after[name].dtype == wanted, name
        if "q_proj" in name or name.endswith("mlp.gate.weight"):
            assert not after[name].equal(weight.to(wanted))
            torch.testing.assert_close(after[name].float(), exact[name].to(wanted).float(), rtol=1e-6, atol=1e-6)
        else:
            assert after[name].equal(weight.to(wanted)), name
    assert not (whole / "model.safetensors.part").exists()


def test_a_chain_is_not_rounded_between_its_merges(tmp_path):
    """Two adapters whose parts add up: rounded between, the first one's small change would be lost to bf16."""
    base = tiny.save_tiny_model(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    for seed, name in enumerate("abc"):
        make_adapter(base, tmp_path / name, lora(*LAYERS), seed=seed)
    paths = [str(tmp_path / name) for name in "abc"]
    exact = load(base, *paths).merge_and_unload().state_dict()
    merge_lora.main(["--model_path", base, "--adapter", ",".join(paths), "--output_dir", str(tmp_path / "merged")])
    for name, weight in bits(tmp_path / "merged" / "model.safetensors").items():
        assert weight.equal(exact[name].bfloat16()), name
    spoken = load_trained(TrainedArgs(), Parts(base, tuple(paths)), torch.bfloat16).get_base_model()
    two = load(base, *paths[:2]).merge_and_unload().state_dict()
    for name, weight in spoken.state_dict().items():
        name = name.replace(".base_layer", "")
        if "lora" not in name:
            assert weight.equal(two[name].bfloat16()), name
