"""The ways to train, by their flags; logits of a model; and a base with untrained rows."""

import tiny
import torch
from transformers import AutoModelForCausalLM

from utils.model.special_tokens import impossible_tokens

MODES = {
    "full": ["--train_mode", "full"],
    "lora": [],
    "dora": ["--use_dora", "true"],
    "qlora": ["--train_mode", "qlora"],
    "qdora": ["--train_mode", "qlora", "--use_dora", "true"],
    "rslora": ["--use_rslora", "true", "--learning_rate", "1e-3"],
    "pissa": ["--init_lora_weights", "pissa"],
    "rspissa": ["--init_lora_weights", "pissa", "--use_rslora", "true", "--learning_rate", "1e-3"],
}
IDS = torch.arange(5, 25)[None]


def logits_of(model):
    with torch.inference_mode():
        return model.eval()(IDS).logits.float()


def base_with_untrained(folder, tokenizer, untrained, how, tied):
    """A base whose rows are trained but for `untrained` and those that no text can have.

    Args:
        how: "zero", as weight decay leaves rows in the end, or "drift", as a softmax pushes them: all one way.
    """
    tiny.save_tiny_model(folder, "qwen2", tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(folder)
    left = [*impossible_tokens(tokenizer, len(tokenizer)), *untrained]
    with torch.no_grad():
        for layer in {model.get_input_embeddings(), model.get_output_embeddings()}:
            start = layer.weight[left].clone()
            layer.weight.mul_(10)
            layer.weight[left] = start * 1e-4 if how == "zero" else start + torch.ones(start.shape[-1])
    model.save_pretrained(folder)
    return str(folder)
