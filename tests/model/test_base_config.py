"""A run's weights can be loaded again; language models of larger models that no class would load are not saved."""

import pytest
import tiny
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, MllamaConfig, MllamaForConditionalGeneration

from utils.model.base_config import refuse_unloadable
from utils.runtime.errors import UserError
from utils.script import merge_lora


@pytest.fixture
def llama_vision(tmp_path):
    """The folder of a small Llama 3.2 Vision."""
    tokenizer, folder = tiny.byte_level_tokenizer(), tmp_path / "vision"
    text = dict(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=128, cross_attention_layers=[1], pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    vision = dict(
        hidden_size=32, num_hidden_layers=1, num_global_layers=1, attention_heads=2, intermediate_size=64,
        vision_output_dim=64, image_size=28, patch_size=14, intermediate_layers_indices=[0],
        supported_aspect_ratios=[[1, 1]],
    )  # fmt: skip
    MllamaForConditionalGeneration(MllamaConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_full_weights_that_could_not_be_loaded_are_refused_before_training(llama_vision, train, tmp_path):
    with pytest.raises(ValueError, match="Unrecognized configuration class"):  # why
        AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(llama_vision).config)
    with pytest.raises(UserError, match="MllamaForCausalLM.* cannot load again; use --train_mode lora"):
        train("--train_mode", "full", model=llama_vision)
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_an_adapter_is_trained_and_its_merge_refused(llama_vision, train, tmp_path):
    run = train("--max_steps", "1", model=llama_vision)
    assert (run / "adapter_model.safetensors").is_file()
    with pytest.raises(UserError, match="MllamaForCausalLM.* keep the adapter"):
        merge_lora.main(["--model_path", str(run), "--output_dir", str(tmp_path / "merged")])
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("kind", ["qwen2", "gemma3", "gemma4", "llama4", "qwen3_5", "fuyu"])
def test_models_that_are_found_by_their_configuration_are_saved(kind, tmp_path):
    CONFIG_MAPPING[kind]().save_pretrained(tmp_path)
    refuse_unloadable(str(tmp_path), "--model_name_or_path", False, "")
