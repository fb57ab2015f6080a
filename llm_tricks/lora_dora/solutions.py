"""Solutions of the exercises of lora_dora.ipynb."""

import torch


# exercise 1
def rslora(base, rank, alpha):
    layer = LoRALinear(base, rank, alpha)  # noqa: F821 — the notebook's own class
    # scale = α/√r
    layer.scale = alpha / rank**0.5
    return layer


# exercise 2
def extract_lora(before, after, rank):
    # W' − W0 = U S Vᵀ; the first r terms are the closest matrix of rank r
    U, S, Vh = torch.linalg.svd(after - before, full_matrices=False)
    root = S[:rank].sqrt()
    return root[:, None] * Vh[:rank], U[:, :rank] * root


# exercise 3
def unmerge(merged, change, m, norm):
    # W' = m/‖V‖ · V  →  V = W' · ‖V‖/m;  W0 = V − ΔW
    return merged * norm / m - change
