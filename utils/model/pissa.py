"""Sets up PiSSA training, and converts its adapter to a plain LoRA on the unchanged base."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.runtime.errors import UserError
from utils.storage.run_folder import MANIFEST

IN_CHECKPOINT = "pissa_start.safetensors"  # A0 and B0, next to the adapter of a checkpoint


def with_pissa(model, config, keep_dtype: bool):
    """Wraps a model in adapters that start as the main singular vectors of its weights.

    PiSSA (arXiv 2404.02948) trains (W0 - s B0 A0) + s B A. PEFT 0.21 stores the residual W0 - s B0 A0 in the base's
    dtype. In bf16 the rounding error is of the size of what training changes, and an adapter for W0 does not contain
    it. Here W0 is kept, and s B0 A0 x is subtracted from the layer's output, so that only activations are rounded.

    Args:
        model: the base.
        config: peft.LoraConfig, with `init_lora_weights="pissa"`; the wrapped model keeps it.
        keep_dtype: whether DeepSpeed or FSDP will cast the adapters to bf16; they then start with bf16 values.

    Returns:
        peft.PeftModel; its base layers have A0 and B0 as non-persistent buffers, which are not saved.
    """
    import torch
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    config.init_lora_weights = True  # PEFT 0.21's own start would overwrite the base
    model = get_peft_model(model, config)
    config.init_lora_weights = model.peft_config["default"].init_lora_weights = "pissa"
    for layer in model.modules():
        if not isinstance(layer, LoraLayer):
            continue
        base = layer.get_base_layer()
        original = base.weight.data.clone()
        layer.pissa_init("default", "pissa")
        base.weight.data = original
        for factor, name in ((layer.lora_A, "pissa_A"), (layer.lora_B, "pissa_B")):
            start = factor["default"].weight.data.contiguous()
            start = start.to(torch.bfloat16).float() if keep_dtype else start
            factor["default"].weight.data = start
            base.register_buffer(name, start.clone(), persistent=False)
        base.pissa_scaling = layer.scaling["default"]
        base.register_forward_hook(_residual)
    return model


def _residual(base, args, output):
    """W0 x → W0 x - s B0 A0 x, in the dtypes in which PEFT adds s B A x."""
    import torch
    from torch.nn.functional import linear

    x = args[0]
    if not torch.is_autocast_enabled(x.device.type):
        x = x.to(base.pissa_A.dtype)
    initial = linear(linear(x, base.pissa_A), base.pissa_B) * base.pissa_scaling
    return (output - initial).to(output.dtype)


def pissa_to_lora(folder: Path, start: Path) -> None:
    """Rewrites a PiSSA adapter as a plain LoRA on the unchanged base, of twice the rank.

    PiSSA trains W = (W0 - B0 A0) + B A, so against W0 (arXiv 2404.02948, appendix C)

        W - W0 = B A - B0 A0 = [B | -B0] [A ; A0]

    PEFT 0.21's own conversion loses trained token rows.

    Args:
        folder: of the trained adapter, which is replaced by the LoRA.
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
    # keeps the scale: alpha / r, or alpha / sqrt(r) when rank-stabilised
    config["lora_alpha"] *= 2**0.5 if config["use_rslora"] else 2
    config["r"] *= 2
    config["init_lora_weights"] = True
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@contextmanager
def plain_lora(path: str, flag: str) -> Iterator[str]:
    """Yields the folder to load an adapter from: a checkpoint of a PiSSA run is first converted to a plain LoRA.

    PEFT 0.21 would compute PiSSA's start again, and round the residual to the dtype in which the base is loaded.

    Args:
        path: the adapter's folder, or its name on the Hub.
        flag: the flag that named it, for the message.

    Yields:
        `path` itself for every other adapter, also for one trained with PEFT's own PiSSA; else a temporary folder.

    Raises:
        UserError: the checkpoint lacks the start weights.
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
