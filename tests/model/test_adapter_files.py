"""An adapter's files: which can be merged, which token rows they train, and the vocabulary they were trained with."""

import json

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from utils.model.adapter_files import attach_adapter, check_mergeable, fit_vocabulary, trained_tokens
from utils.runtime.errors import UserError

ROWS = 40


def base():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny.config_for("qwen2", ROWS, tie_word_embeddings=False))


def write_config(folder, **values):
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return str(folder)


def write_tensors(folder, **shapes):
    names = {f"base_model.model.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    save_file(names, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("kind", ["LORA", "LOHA", "IA3", "OFT"])
def test_adapters_that_change_weights_can_be_merged(kind, tmp_path):
    assert check_mergeable(write_config(tmp_path, peft_type=kind)) == []


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "of the type PROMPT_TUNING"),
        ({"peft_type": "NOBODYS"}, "of the type NOBODYS"),
        ({"peft_type": "LORA", "alora_invocation_tokens": [1]}, "aLoRA"),
        ({"peft_type": "LORA", "layer_replication": [[0, 2]]}, "repeated layers"),
    ],
)
def test_other_adapters_cannot_be_merged(values, reason, tmp_path):
    (problem,) = check_mergeable(write_config(tmp_path, **values))
    assert reason in problem and "cannot be merged" in problem


def test_a_missing_configuration_is_no_problem_of_merging(tmp_path):
    assert check_mergeable(str(tmp_path)) == []


@pytest.mark.parametrize(
    ("values", "tokens"),
    [({}, []), ({"trainable_token_indices": [7, 2]}, [2, 7]), ({"token_indices": [3]}, [3]),
     ({"trainable_token_indices": {"embed_tokens": [7, 2], "lm_head": [2, 9]}}, [2, 7, 9])],
)  # fmt: skip
def test_trained_tokens_are_those_of_every_layer_once(values, tokens, tmp_path):
    assert trained_tokens(str(tmp_path)) == []
    assert trained_tokens(write_config(tmp_path, peft_type="LORA", **values)) == tokens


@pytest.mark.parametrize("rows", [ROWS - 3, ROWS + 5])
def test_a_base_gets_as_many_rows_as_the_adapter_holds(rows, tmp_path):
    model = base()
    kept = model.get_input_embeddings().weight[: ROWS - 3].clone()
    path = write_tensors(tmp_path, **{"model.embed_tokens.weight": (rows, 64), "lm_head.weight": (rows, 64)})
    fit_vocabulary(model, path, "--adapter")
    assert model.config.vocab_size == rows
    assert [layer().weight.shape[0] for layer in (model.get_input_embeddings, model.get_output_embeddings)] == [
        rows
    ] * 2
    assert torch.equal(model.get_input_embeddings().weight[: ROWS - 3], kept)


def test_a_smaller_vocabulary_is_also_known_from_lora_on_the_head(tmp_path):
    model = base()
    path = write_tensors(tmp_path, **{"lm_head.lora_B.weight": (30, 4), "lm_head.lora_A.weight": (4, 64)})
    fit_vocabulary(model, path, "--adapter")
    assert model.config.vocab_size == 30


@pytest.mark.parametrize(
    "shapes",
    [
        {"lm_head.lora_B.weight": (50, 4)},  # new rows, which the adapter does not hold
        {"lm_head.weight": (50, 64)},  # those of the head alone
        {"model.embed_tokens.weight": (30, 64), "lm_head.weight": (50, 64)},
    ],
)
def test_rows_that_neither_holds_are_refused(shapes, tmp_path):
    with pytest.raises(UserError, match="a vocabulary of 50 rows, and the base has 40"):
        fit_vocabulary(base(), write_tensors(tmp_path, **shapes), "--adapter")


def test_a_damaged_file_is_named_with_its_flag(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x00" * 5)
    with pytest.raises(UserError, match="the adapter of --adapter .*copy or download it again"):
        fit_vocabulary(base(), str(tmp_path), "--adapter")


@pytest.mark.parametrize("trainable", [True, False])
def test_an_attached_adapter_has_the_weights_of_its_file(trainable, tmp_path):
    made = get_peft_model(base(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    made.save_pretrained(tmp_path)
    found = attach_adapter(base(), str(tmp_path), "--adapter", trainable)
    weights = {name: weight for name, weight in found.named_parameters() if "lora_" in name}
    wanted = dict(made.named_parameters())
    assert len(weights) == 4 and all(torch.equal(weight, wanted[name]) for name, weight in weights.items())
    assert {weight.requires_grad for weight in weights.values()} == {trainable}
