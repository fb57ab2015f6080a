"""How much arithmetic the training of a model takes, and how much a card could do in that time.

Counted is what the model needs, after PaLM (arXiv 2204.02311, appendix B): what gradient checkpointing computes again
does not count. A multiplication with its addition is two operations.
"""

import re
from dataclasses import dataclass

_SMALL = {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}
# config.json of Qwen/Qwen2.5-0.5B, -1.5B and -7B on the hub
SHAPES = {
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
             "vocab_size": 3584},
}  # fmt: skip

# name → bf16 on the tensor cores, dense, with sums in float32, in TFLOP/s; the first name that fits counts. NVIDIA's
# data sheets of H100, H200, A100, L40S, L4 (half of what they give "with sparsity") and Ada's white paper (RTX 4090)
PEAKS = [
    ("H200 NVL", 835), ("H200", 989), ("H100 PCIe", 756), ("H100 NVL", 835), ("H100", 989),
    ("A100", 312), ("L40S", 362), ("L4", 121), ("RTX 4090", 165),
]  # fmt: skip


@dataclass(frozen=True)
class Counts:
    """What takes part in the arithmetic: weights of the layers, of the head, of the adapters, and the layers' size."""

    body: int
    head: int
    adapter: int
    layers: int
    hidden: int


def config_of(shape: str, **more):
    """The shape's configuration as transformers knows it."""
    from transformers import Qwen2Config

    figures = {"max_position_embeddings": 32768, "rope_theta": 1000000.0, **_SMALL, **SHAPES[shape], **more}
    return Qwen2Config(**figures)


def count(shape: str, rank: int) -> Counts:
    """Counts a shape's weights, without making any; `rank` is that of adapters on every linear layer but the head."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(shape))
    linear = [module for module in model.model.modules() if isinstance(module, torch.nn.Linear)]
    head = model.lm_head.weight.numel()
    lookup = 0 if model.config.tie_word_embeddings else model.model.embed_tokens.weight.numel()
    return Counts(
        body=model.num_parameters() - head - lookup,  # the embeddings are looked up, not multiplied
        head=head,
        adapter=sum(rank * (module.in_features + module.out_features) for module in linear),
        layers=model.config.num_hidden_layers,
        hidden=model.config.hidden_size,
    )


def flops(counts: Counts, mode: str, tokens: float, labelled: float, squares: float) -> float:
    """The operations that one pass forward and one backward over some rows need.

    A weight takes 2 operations a token forward, 2 for the gradient of its input, and 2 for its own gradient, which a
    frozen one does not have. Causal attention takes 2 · hidden · length² for a layer and row forward, twice that
    backward. The head is for labelled tokens alone: no loss needs the others' logits, and neither program makes them.

    Args:
        counts: from `count`.
        mode: `full` or `lora`.
        tokens: of all rows, without padding.
        labelled: those of them with a label.
        squares: the sum of the rows' length².
    """
    base = 6 if mode == "full" else 4
    adapter = 6 * counts.adapter * tokens if mode == "lora" else 0
    attention = 6 * counts.layers * counts.hidden * squares
    return base * (counts.body * tokens + counts.head * labelled) + adapter + attention


def peak(card: str) -> float | None:
    """A card's operations per second in bf16 by its name, None for one that is not in the table."""
    # a laptop's card, or one with a letter more, is another one
    return next((1e12 * figure for name, figure in PEAKS if re.search(rf"\b{name}\b(?! Laptop| D\b)", card)), None)
