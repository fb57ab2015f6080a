"""LoRA on the experts of a mixture, and trained routers: gradients, merging, reloading, and what is refused."""

import json

import pytest
import tiny
import torch
from parsing import problems_of
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from test_adapter_targets import flags as lora_flags
from transformers import AutoModelForCausalLM

from utils.model.adapter import build_adapter
from utils.model.expert_targets import expert_parameters, router_modules
from utils.runtime.errors import UserError

SIZES = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
IDS = torch.arange(48).reshape(2, 24)


def model_of(kind):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny.config_for(kind, 64, **SIZES.get(kind, {}))).float()


def flags(**given):
    return lora_flags(**{"lora_experts": True, "train_router": False} | given)


def with_adapter(model, **given):
    return get_peft_model(model, build_adapter(flags(**given), model, None, None))


@pytest.mark.parametrize("kind", SIZES)
def test_every_routed_expert_gets_a_gradient_and_the_base_none(kind):
    peft = with_adapter(model_of(kind))
    weights = [(name, weight) for name, weight in peft.named_parameters() if weight.requires_grad]
    assert any("experts" in name for name, _ in weights)
    torch.manual_seed(1)
    for name, weight in weights:
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    peft(input_ids=IDS, labels=IDS).loss.backward()
    for name, weight in weights:
        if "experts" in name and "lora_" in name:
            rows = weight.grad.reshape(4, -1) if "lora_A" in name else weight.grad.T.reshape(4, -1)
            assert (rows.abs().sum(1) > 0).all(), name  # rank times four experts
    assert all(weight.grad is None for name, weight in peft.named_parameters() if not weight.requires_grad)


@pytest.mark.parametrize("kind", SIZES)
def test_the_adapter_adds_b_times_a_to_each_expert(kind):
    """Against each expert's weight plus its own B·A, computed in plain PyTorch and put into the base."""
    base, peft = model_of(kind), with_adapter(model_of(kind), lora_target_modules="o_proj")
    torch.manual_seed(1)
    lora = {name: weight for name, weight in peft.named_parameters() if weight.requires_grad}
    for name, weight in lora.items():
        torch.nn.init.normal_(weight, std=0.05) if "experts" in name else torch.nn.init.zeros_(weight)
    merged = peft.merge_and_unload()
    again = with_adapter(model_of(kind), lora_target_modules="o_proj")
    own = dict(again.named_parameters())
    for name, weight in lora.items():
        own[name].data.copy_(weight)
    torch.testing.assert_close(again(IDS).logits, merged(IDS).logits, rtol=1e-4, atol=1e-5)
    weights, moved = dict(base.named_parameters()), dict(merged.named_parameters())
    for name in expert_parameters(base):
        difference = moved[name] - weights[name]
        ranks = [int(torch.linalg.matrix_rank(expert, tol=1e-5)) for expert in difference]
        assert len(ranks) == 4 and set(ranks) == {4}, name  # of the rank of the adapter, for each expert


def test_routers_are_found_and_trained_as_they_are():
    for kind in SIZES:
        model = model_of(kind)
        names = router_modules(model)
        assert len(names) == 2, kind
        peft = with_adapter(model, train_router=True, lora_experts=False)
        trained = [
            name for name, weight in peft.named_parameters() if weight.requires_grad and "modules_to_save" in name
        ]
        assert {name.split(".modules_to_save")[0].removeprefix("base_model.model.") for name in trained} == set(names)


@pytest.mark.parametrize("name", ["lora_experts", "train_router"])
def test_a_dense_model_is_refused(name):
    with pytest.raises(UserError, match=f"--{name} true: LlamaForCausalLM has no"):
        build_adapter(flags(**{"lora_experts": False, name: True}), model_of("llama"), None, None)


@pytest.mark.parametrize(("more", "said"), [
    (["--lora_dropout", "0.1"], "PEFT has no --lora_dropout 0.1 for experts"),
    (["--use_dora", "true"], "PEFT has no --use_dora True for experts"),
    (["--init_lora_weights", "pissa"], "PEFT has no --init_lora_weights pissa for experts"),
    (["--train_mode", "full"], "--lora_experts"),
])  # fmt: skip
def test_what_peft_lacks_is_refused_before_the_weights_load(parse, more, said):
    assert any(said in problem for problem in problems_of(parse, "--lora_experts", "true", *more))


def test_a_run_on_experts_and_router_is_merged_and_loaded_by_plain_peft(train, tmp_path):
    from utils.script.merge_lora import main as merge_lora

    base = tiny.save_tiny_model(tmp_path / "base", "qwen3_moe", **SIZES["qwen3_moe"])
    folder = train("--lora_experts", "true", "--train_router", "true", "--max_steps", "2", "--learning_rate", "1e-2",
                   "--precision", "fp32", "--router_aux_loss_coef", "0.01", model=str(base))  # fmt: skip
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    assert config["target_parameters"] and config["modules_to_save"]
    merge_lora(["--model_path", str(folder), "--output_dir", str(tmp_path / "merged"), "--dtype", "float32"])
    start = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = PeftModel.from_pretrained(start, folder).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(merged(IDS).logits, peft(IDS).logits, rtol=1e-4, atol=1e-4)
    before, after = (load_file(f"{path}/model.safetensors") for path in (base, tmp_path / "merged"))
    assert any("gate.weight" in name and not torch.equal(before[name], after[name]) for name in before)
    again = train("--adapter_name_or_path", str(folder), "--max_steps", "1", model=str(base), output="again")
    assert json.loads((again / "train_args.json").read_text("utf-8"))["common"]["lora_experts"] is True
