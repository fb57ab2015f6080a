"""The model without weights: its counts are those of the loaded model."""

from types import SimpleNamespace

import pytest

from utils.model import meta
from utils.tasks import get_task


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("modules", [None, "q_proj,down_proj"])
def test_trained_weights_are_counted_as_in_peft(dora, modules, tiny_models):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    args = SimpleNamespace(
        train_mode="lora", lora_rank=3, use_dora=dora, adapter_name_or_path=None, trust_remote_code=False,
        model_name_or_path=tiny_models("llama"), lora_target_modules=modules, lora_alpha=6, lora_dropout=0.0,
        add_tokens=None, lora_experts=False, train_router=False, use_rslora=False, task=get_task("sft"),
    )  # fmt: skip
    targets = modules.split(",") if modules else "all-linear"
    config = LoraConfig(task_type="CAUSAL_LM", r=3, use_dora=dora, target_modules=targets)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_models("llama")), config)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert meta.model_size(args).trained == trained
