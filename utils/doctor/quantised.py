"""What `--train_mode qlora` leaves in 16 bits of a base, by its config.json: bitsandbytes packs linear layers alone."""

import re

from utils.doctor.findings import Finding
from utils.doctor.resources import size
from utils.memory.layout import quantised_bytes
from utils.model.meta import is_quantised, meta_base

_SHARE = 0.01  # of the weights, from which it is worth a line; a mixture's experts are nine tenths


def quantised_findings(args, train_args) -> list[Finding]:
    """Names the weights that are in no linear layer, such as a mixture's experts, and their bytes.

    Embeddings, the head, norms and biases are in 16 bits in every QLoRA, and are not named.

    Args:
        args, train_args: of a run whose base is quantised.
    """
    model = meta_base(args, train_args)
    whole = (model.get_input_embeddings(), model.get_output_embeddings())
    usual = {id(weight) for layer in whole if layer is not None for weight in layer.parameters()}
    total, packed, left = 0, 0, {}
    for name, weight in model.named_parameters():
        total += weight.numel()
        if is_quantised(weight):
            packed += quantised_bytes(weight.numel()).bytes
        elif weight.ndim > 1 and id(weight) not in usual:
            left[name] = weight
    count = sum(weight.numel() for weight in left.values())
    if count <= _SHARE * total:
        return []
    largest = sorted(left, key=lambda name: -left[name].numel())
    kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in largest))
    held = sum(weight.numel() * weight.element_size() for weight in left.values())
    message = (
        f"{count:,} of {total:,} weights are in no linear layer and stay in {_bits(left.values())} bits, {size(held)}: "
        f"{', '.join(kinds[:3])}; what is in 4 bits takes {size(packed)}"
    )
    return [Finding("QLORA_LEAVES_WEIGHTS", message)]


def _bits(weights) -> str:
    return " and ".join(str(bits) for bits in sorted({8 * weight.element_size() for weight in weights}))
