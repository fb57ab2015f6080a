"""Which arithmetic a run uses: bf16, fp16 or fp32, and what the device can do."""

from utils.runtime.errors import Problem, refusal


def device_has_bf16() -> bool:
    """Whether this machine computes in bf16 by itself, rather than emulating it."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.backends.mps.is_available():
        return True
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def check_precision(common, values: dict, given: set[str]) -> list[Problem]:
    """Turns `--precision` into the trainer's `bf16` and `fp16`, unless those were given themselves."""
    import torch

    problems, asked = [], common.precision
    direct = [name for name in ("bf16", "fp16") if name in given and values[name]]
    if "precision" in given and direct and asked not in ("auto", direct[0]):
        problems += refusal(
            f"--precision {asked} contradicts --{direct[0]} true; give one of them", "precision", direct[0]
        )
    elif "bf16" in given and values["bf16"] is False and common.precision == "bf16":
        problems += refusal("--precision bf16 contradicts --bf16 false; give one of them", "precision", "bf16")
    elif len(direct) == 2:
        problems += refusal("--bf16 true contradicts --fp16 true; give one of them", "bf16", "fp16")
    elif direct:
        asked = direct[0]
    elif asked == "auto" and values.get("bf16") is False and "bf16" in given:
        asked = "fp32"
    if asked == "auto":
        asked = "bf16" if device_has_bf16() else "fp16" if torch.cuda.is_available() else "fp32"
    if asked == "bf16" and not device_has_bf16():
        problems += refusal(
            "bf16 was asked for, which this device does not have; use --precision auto, fp16 (CUDA) or fp32",
            "precision",
        )
        asked = "fp32"
    if asked == "fp16" and not torch.cuda.is_available():
        problems += refusal(
            "fp16 was asked for, which trains on a CUDA device only; use --precision auto, bf16 or fp32", "precision"
        )
        asked = "fp32"
    common.precision = asked
    values["bf16"], values["fp16"] = asked == "bf16", asked == "fp16"
    # without a GPU the trainer wants to be told so before it takes bf16
    values["use_cpu"] = values.get("use_cpu") or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    return problems
