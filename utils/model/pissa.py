"""PiSSA: what is trained beside a changed base, as an adapter for the base as it was."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.runtime.errors import UserError
from utils.storage.run_folder import MANIFEST

IN_CHECKPOINT = "pissa_start.safetensors"  # A0 and B0, beside the adapter of a checkpoint


def with_pissa(model, config, one_type: bool):
    """Wraps a model in adapters that start as the main singular vectors of its weights.

    PiSSA (arXiv 2404.02948) trains (W0 - s B0 A0) + s B A. PEFT stores the residual W0 - s B0 A0 in the base's type:
    in bf16 its rounding is as large as a good part of what training changes, and an adapter for W0 lacks it. Here W0
    stays as it is, and s B0 A0 x is taken off what the layer gives, so that nothing is rounded but activations.

    Args:
        model: the base.
        config: peft.LoraConfig, with `init_lora_weights="pissa"`; the wrapped model keeps it.
        one_type: whether DeepSpeed or FSDP will turn the adapters into bf16; they then begin with values of that type.

    Returns:
        peft.PeftModel; its base layers hold A0 and B0 beside their weights, and neither is saved with them.
    """
    import torch
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    config.init_lora_weights = True  # PEFT's own start would overwrite the base
    model = get_peft_model(model, config)
    config.init_lora_weights = model.peft_config["default"].init_lora_weights = "pissa"
    for layer in model.modules():
        if not isinstance(layer, LoraLayer):
            continue
        base = layer.get_base_layer()
        whole = base.weight.data.clone()
        layer.pissa_init("default", "pissa")
        base.weight.data = whole
        for half, name in ((layer.lora_A, "pissa_A"), (layer.lora_B, "pissa_B")):
            start = half["default"].weight.data.contiguous()
            start = start.to(torch.bfloat16).float() if one_type else start
            half["default"].weight.data = start
            base.register_buffer(name, start.clone(), persistent=False)
        base.pissa_scaling = layer.scaling["default"]
        base.register_forward_hook(_residual)
    return model


def _residual(base, args, output):
    """W0 x → W0 x - s B0 A0 x, in the types in which PEFT adds s B A x."""
    import torch
    from torch.nn.functional import linear

    x = args[0]
    if not torch.is_autocast_enabled(x.device.type):
        x = x.to(base.pissa_A.dtype)
    taken = linear(linear(x, base.pissa_A), base.pissa_B) * base.pissa_scaling
    return (output - taken).to(output.dtype)


def pissa_to_lora(folder: Path, start: Path) -> None:
    """Rewrites a PiSSA adapter as a plain LoRA on the unchanged base, of twice the rank.

    PiSSA trains W = (W0 - B0 A0) + B A, so against W0 (arXiv 2404.02948, appendix C)

        W - W0 = B A - B0 A0 = [B | -B0] [A ; A0]

    PEFT's own conversion loses trained token rows, which stand beside A and B.

    Args:
        folder: holds the trained adapter, and the new one afterwards.
        start: the safetensors file of the adapter as it was before training.
    """
    import torch
    from safetensors.torch import load_file, save_file

    weights, before = load_file(folder / "adapter_model.safetensors"), load_file(start)
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


@contextmanager
def plain_lora(path: str, flag: str) -> Iterator[str]:
    """The folder that an adapter is loaded from: a checkpoint of a PiSSA run as the plain LoRA that a run ends with.

    PEFT's own start would be computed again, and would round the residual to the type that the base is loaded in.

    Args:
        path: the adapter's folder, or a hub's name.
        flag: the flag it came by, for the message.

    Yields:
        `path` itself for every other adapter, one that plain PEFT trained with PiSSA included; else a folder that is
        removed afterwards.

    Raises:
        UserError: the checkpoint lacks the start.
    """
    folder, config = Path(path), Path(path) / "adapter_config.json"
    start = folder / IN_CHECKPOINT
    if not config.is_file() or json.loads(config.read_text(encoding="utf-8")).get("init_lora_weights") != "pissa":
        yield path
    elif start.is_file():
        with tempfile.TemporaryDirectory() as scratch:
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                shutil.copyfile(folder / name, Path(scratch) / name)
            pissa_to_lora(Path(scratch), start)
            yield scratch
    elif (folder / MANIFEST).is_file():
        raise UserError(
            f"{flag} {path!r} is a checkpoint of a PiSSA run without {IN_CHECKPOINT}, the adapter that training began "
            "with, so the trained weights cannot be computed from it; use the finished run's folder, or resume the run"
        )
    else:
        yield path
