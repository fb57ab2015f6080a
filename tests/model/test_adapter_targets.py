"""Where adapters go, over architectures that name and build their layers differently; compared with PEFT by itself."""

import copy
import re
from types import SimpleNamespace

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from utils.model.adapter import build_adapter
from utils.model.adapter_targets import find_targets
from utils.model.parts import freeze_towers, routers_of
from utils.runtime.errors import UserError
from utils.tasks import get_task

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
MAMBA = {"state_size": 8, "time_step_rank": 8, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 16}
VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip

# architecture → changes of its configuration, and the linear layers that get no adapter by default
FAMILIES = {
    "llama": ({}, set()),
    "gpt2": ({}, set()),
    "falcon": ({"head_dim": None, "num_key_value_heads": None}, set()),
    "ctrl": ({"dff": 64}, set()),
    "mamba": (MAMBA, {"backbone.layers.N.mixer.out_proj", "backbone.layers.N.mixer.dt_proj"}),
    "mamba2": (MAMBA, {"backbone.layers.N.mixer.out_proj"}),
    "falcon_mamba": (MAMBA, {"backbone.layers.N.mixer.out_proj", "backbone.layers.N.mixer.dt_proj"}),
    "jamba": (
        {"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8, "mamba_d_state": 8},
        {"model.layers.N.mamba.dt_proj"},
    ),
    "gemma3n_text": (
        {
            "num_hidden_layers": 4, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 500, "intermediate_size": [64] * 4, "activation_sparsity_pattern": [0.0] * 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2, "laurel_rank": 8,
        },
        {"model.layers.N.altup.correction_coefs"},
    ),
    "jetmoe": (
        {"num_local_experts": 4, "kv_channels": 16},
        {"model.layers.N.mlp.router.layer", "model.layers.N.self_attention.experts.router.layer"},
    ),
    "qwen2_moe": (
        {"num_experts": 4, "shared_expert_intermediate_size": 32, **EXPERTS},
        {"model.layers.N.mlp.shared_expert_gate"},
    ),
    "phimoe": ({"num_local_experts": 4}, {"model.layers.N.mlp.router"}),
    "longcat_flash": (
        {
            "num_layers": 2, "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2, "expert_ffn_hidden_size": 32,
            "ffn_hidden_size": 64, "head_dim": 8, "num_key_value_heads": 4, **LATENT,
        },
        {
            "model.layers.N.mlp.router.classifier", "model.layers.N.mlps.N.gate_proj", "model.layers.N.mlps.N.up_proj",
            "model.layers.N.mlps.N.down_proj",
        },
    ),
    "zaya": (
        {"num_experts": 4, "zaya_mlp_expansion": 16},
        {
            "model.layers.N.mlp.gate.down_proj", "model.layers.N.mlp.gate.router_mlp.fc1",
            "model.layers.N.mlp.gate.router_mlp.fc2", "model.layers.N.mlp.gate.router_mlp.out_proj",
        },
    ),
    "glm4_moe": (
        {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, **EXPERTS},
        {f"model.layers.N.mlp.{part}{name}_proj" for part in ("", "shared_experts.") for name in ("gate", "up", "down")}
    ),
    "laguna": (
        {"num_experts": 4, "shared_expert_intermediate_size": 32, **EXPERTS},
        {f"model.layers.N.mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")},
    ),
    "bart": ({"d_model": 64, "decoder_ffn_dim": 64, "decoder_layers": 2, "decoder_attention_heads": 4},
             {f"model.decoder.layers.N.encoder_attn.{name}_proj" for name in ("k", "v", "q", "out")}),
    "gemma3": (
        {"text_config": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                         "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 500}, "vision_config": VISION},
        {f"model.vision_tower.encoder.layers.N.{name}" for name in (
            "self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")}
        | {f"model.vision_tower.head.{name}" for name in ("attention.out_proj", "mlp.fc1", "mlp.fc2")},
    ),
}  # fmt: skip
IDS = torch.arange(20, 44)[None]


def config_of(architecture):
    size = {
        "vocab_size": 500, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0,
        **FAMILIES[architecture][0],
    }  # fmt: skip
    return AutoConfig.for_model(architecture, **{name: value for name, value in size.items() if value is not None})


def build(architecture):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(architecture), dtype=torch.float32).eval()


def flags(**given):
    settings = {
        "train_mode": "lora", "adapter_name_or_path": None, "train_special_tokens": "off", "lora_rank": 4,
        "lora_alpha": 8, "lora_dropout": 0.0, "lora_target_modules": None, "use_dora": False, "use_rslora": False,
        "init_lora_weights": "default", "precision": "fp32", "add_tokens": None,
        "lora_experts": False, "train_router": False,
    }  # fmt: skip
    return SimpleNamespace(task=get_task("sft"), **settings | given)


def numberless(names):
    return {re.sub(r"\.\d+(?=\.|$)", ".N", name) for name in names}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_layer_that_can_learn_gets_an_adapter_that_plain_peft_reads(architecture, tmp_path):
    """Every adapter has a gradient from text; saved and loaded by PEFT alone, the logits are the same."""
    base = build(architecture)
    head = base.get_output_embeddings()
    linear = {n for n, m in base.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D)) and m is not head}
    again = copy.deepcopy(base)
    model = get_peft_model(base, build_adapter(flags(), base, None, None))
    names = {n.partition("base_model.model.")[2] for n, p in model.named_parameters() if p.requires_grad}
    adapted = {name.partition(".lora_")[0] for name in names}
    assert numberless(linear - adapted) == FAMILIES[architecture][1] and adapted <= linear

    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert not [name for name, weight in trained.items() if weight.grad is None]
    with torch.no_grad():
        for weight in trained.values():
            weight.add_(torch.randn_like(weight) * 0.1)
        model.save_pretrained(tmp_path)
        wanted = model(input_ids=IDS).logits
        got = PeftModel.from_pretrained(again, tmp_path)(input_ids=IDS).logits
        plain = build(architecture)(input_ids=IDS).logits
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert (wanted - plain).abs().max() > 1e-3


class Router(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.wg = torch.nn.Linear(8, 6)


class Mixture(torch.nn.Module):
    """Experts as linear layers, as in the code that many models bring along."""

    def __init__(self, router):
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(6))
        self.add_module(*router)


@pytest.mark.parametrize(
    ("router", "found"),
    [
        (("gate", torch.nn.Linear(8, 6)), {"mlp.gate"}),
        (("gate", Router()), {"mlp.gate", "mlp.gate.wg"}),
        (("expert_router", torch.nn.Linear(8, 9)), {"mlp.expert_router"}),
        (("chooser", torch.nn.Linear(8, 6)), {"mlp.chooser"}),  # by its size: one output for each expert
        (("gate_proj", torch.nn.Linear(8, 8)), set()),
    ],
)
def test_routers_are_found_by_how_the_mixture_is_built(router, found):
    model = torch.nn.Module()
    model.mlp = Mixture(router)
    config = tiny.config_for("llama", 500, num_local_experts=6)
    model.config = config
    assert routers_of(model) == found


def test_a_gate_without_experts_is_no_router():
    model = torch.nn.Module()
    model.mlp = torch.nn.Module()
    model.mlp.gate = torch.nn.Linear(8, 6)
    model.config = tiny.config_for("llama", 500)
    assert routers_of(model) == set()


@pytest.mark.parametrize(
    ("architecture", "chosen", "said"),
    [
        ("mamba", "out_proj", "PEFT refuses it in mamba"),
        ("glm4_moe", "q_proj,gate_proj", "PEFT takes its name for the experts of glm4_moe"),
        ("phimoe", "router", "it computes something else than W x + b"),
        ("gemma3", "fc1", "only text is trained"),
        ("laguna", "shared_experts.up_proj", "PEFT would not find it again"),
        ("llama", "q_prj", "no linear layer to adapt is named 'q_prj'"),
    ],
)
def test_a_name_that_cannot_be_adapted_is_refused_with_the_reason(architecture, chosen, said):
    with pytest.raises(UserError) as refusal:
        find_targets(build(architecture), chosen)
    assert said in str(refusal.value) and chosen in str(refusal.value)


def test_a_chosen_name_never_reaches_the_vision_tower():
    base = build("gemma3")
    model = get_peft_model(base, build_adapter(flags(lora_target_modules="q_proj"), base, None, None))
    adapted = {name for name, _ in model.named_parameters() if "lora_A" in name}
    assert len(adapted) == 2 and all(".language_model." in name for name in adapted)


def test_full_training_leaves_the_vision_tower_as_it_is():
    model = build("gemma3")
    freeze_towers(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert {name for name, weight in model.named_parameters() if weight.grad is not None} == trained
    assert trained and not any("vision" in name or "projector" in name for name in trained)


def test_an_adapter_from_elsewhere_is_not_trained_on_in_the_vision_tower():
    model = get_peft_model(build("gemma3"), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    assert any("vision_tower" in name for name, weight in model.named_parameters() if weight.requires_grad)
    assert build_adapter(flags(adapter_name_or_path="elsewhere"), model, None, None) is None
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert trained and all(".language_model." in name for name in trained)


def test_the_targets_are_known_without_weights():
    """The doctor and the plan of memory build the model on the meta device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of("gemma3"))
    assert find_targets(model, None).layers == find_targets(build("gemma3"), None).layers


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"use_rslora": True}, {"init_lora_weights": "pissa"}])
@pytest.mark.parametrize("architecture", ["gpt2", "falcon_mamba", "gemma3n_text"])
def test_the_other_kinds_of_adapter_train_there_too(architecture, kind):
    base = build(architecture)
    model = get_peft_model(base, build_adapter(flags(**kind), base, None, None))
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert not [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]


@pytest.mark.slow
@pytest.mark.usefixtures("fast_processes")
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_two_processes_train_the_text_of_a_multimodal_base(mode, tmp_path, rows_file, tokenizer):
    """Weights that no text reaches have no gradients, which processes would wait for."""
    from test_launch import launched

    config = config_of("gemma3")
    config.text_config.vocab_size, config.image_token_id = len(tokenizer), len(tokenizer) - 1
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    flags = [
        "--model_name_or_path", str(base), "--train_data_path", rows_file, "--output_dir", str(tmp_path / "run"),
        "--train_mode", mode, "--max_steps", "3", "--per_device_train_batch_size", "1", "--precision", "fp32",
        "--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "true",
    ]  # fmt: skip
    done = launched("torchrun --nproc_per_node 2 main_train.py", flags)
    assert done.returncode == 0, done.stderr[-3000:]
    name = "model.safetensors" if mode == "full" else "adapter_model.safetensors"
    before, after = (load_file(path) for path in (base / "model.safetensors", tmp_path / "run" / name))
    seen = {key for key in after if "vision" in key or "projector" in key}
    if mode == "lora":
        assert after and not seen
    else:
        assert seen and all(torch.equal(before[key], after[key]) for key in seen)
        (moved,) = (key for key in after if key.endswith("layers.0.mlp.up_proj.weight"))
        assert not torch.equal(before[moved], after[moved])


@pytest.mark.parametrize(("chosen", "wanted"), [
    ("all-linear", None),
    (r".*\.1\.self_attn\.(q|v)_proj", {"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"}),
    (r"model\.layers\.\d+\.mlp\.down_proj", {f"model.layers.{number}.mlp.down_proj" for number in range(2)}),
])  # fmt: skip
def test_patterns_choose_the_layers_that_pefts_own_do(chosen, wanted):
    """`all-linear` and a regular expression of full names, as in PEFT's `target_modules`."""
    base = AutoModelForCausalLM.from_config(tiny.config_for("llama", 64))
    found = find_targets(base, chosen)
    model = get_peft_model(copy.deepcopy(base), build_adapter(flags(lora_target_modules=chosen), base, None, None))
    ours = {name.removeprefix("base_model.model.").removesuffix(".lora_A.default")
            for name, _ in model.named_modules() if name.endswith("lora_A.default")}  # fmt: skip
    config = LoraConfig(target_modules=chosen, task_type="CAUSAL_LM")
    peft = get_peft_model(copy.deepcopy(base), config)
    theirs = {name.removeprefix("base_model.model.").removesuffix(".lora_A.default")
              for name, _ in peft.named_modules() if name.endswith("lora_A.default")}  # fmt: skip
    assert ours == theirs == set(found.layers)
    assert wanted is None or ours == wanted


@pytest.mark.parametrize(("chosen", "said"), [
    ("(", "a regular expression must match|is no regular expression"), (".*nothing", "and it matches none"),
    ("(q_proj)", "and it matches none"),
    ("lm_.*", "it matches lm_head, which cannot|and it matches none"),
])  # fmt: skip
def test_a_pattern_that_fits_nothing_is_refused(chosen, said):
    with pytest.raises(UserError, match=said):
        find_targets(AutoModelForCausalLM.from_config(tiny.config_for("llama", 64)), chosen)
