"""PiSSA: what is trained beside a changed base, as an adapter for the base as it was."""

import json
from pathlib import Path


def pissa_to_lora(folder: Path, start: Path) -> None:
    """Rewrites a PiSSA adapter as a plain LoRA on the unchanged base, of twice the rank.

    PiSSA trains W = (W0 - B0 A0) + B A, so against W0 (arXiv 2404.02948, appendix C)

        W - W0 = B A - B0 A0 = [B | -B0] [A ; A0]

    PEFT's own conversion loses trained token rows, which stand beside A and B.

    Args:
        folder: holds the trained adapter, and the new one afterwards.
        start: holds the adapter as it was before training.
    """
    import torch
    from safetensors.torch import load_file, save_file

    weights, before = (load_file(path / "adapter_model.safetensors") for path in (folder, start))
    for name, weight in weights.items():
        if "lora_A" in name:
            weights[name] = torch.cat([weight, before[name]], dim=0)
        elif "lora_B" in name:
            weights[name] = torch.cat([weight, -before[name]], dim=1)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    # the scale stays: alpha / r, or alpha / sqrt(r) when rank-stabilised
    config["lora_alpha"] *= 2**0.5 if config["use_rslora"] else 2
    config["r"] *= 2
    config["init_lora_weights"] = True
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
