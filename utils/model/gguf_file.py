"""Reads the header of a GGUF file, llama.cpp's format, and checks that transformers can read it as a model.

No tensor is read, except the rope factors of Llama 3, and float32 weights in a file of 16-bit ones.
"""

import contextlib
import importlib.util
import math
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from utils.runtime.errors import Problem, first_line, refusal

_MAGIC = b"GGUF"
_GIVE = "give another GGUF file of the model, or its folder of safetensors"
# ggml's types of plain numbers → torch's dtype; every other type has blocks of quantised numbers
FLOATS = {0: "float32", 1: "float16", 30: "bfloat16"}
_ROPE_FACTORS = "rope_freqs.weight"
# a setting of a file that transformers 5.23 does not read → the field of the model's configuration with its value
_SAME_AS = {
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "rope.dimension_count": "head_dim",
    "rope.freq_base": "rope_theta",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_feed_forward_length": "moe_intermediate_size",
}
# names of llama.cpp's rules for splitting text that transformers 5.23 lacks; it takes GPT-2's, which is right for these
_LIKE_GPT2 = ("gpt-2", "mpt", "olmo", "jais")
# and these first take each digit by itself
_DIGITS_ALONE = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")


@dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file.

    Attributes:
        path: of the file.
        metadata: name → value; of a list of texts, such as the vocabulary, only its length.
        tensors: (name, shape in torch's order, ggml's type, offset from `data_start`).
        data_start: where the tensors begin, in bytes.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[tuple[str, tuple[int, ...], int, int], ...]
    data_start: int

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture: `llama`, `qwen2`, …"""
        return self.metadata["general.architecture"]

    @cached_property
    def dtype(self) -> str:
        """The smallest dtype that holds the weights exactly as they are; bfloat16 for quantised blocks."""
        types = {kind for name, _, kind, _ in self.tensors if name != _ROPE_FACTORS}
        if not types <= set(FLOATS):
            return "bfloat16"
        narrow = [FLOATS[kind] for kind in types if kind != 0]
        return narrow[0] if len(narrow) == 1 and _floats_fit(self, narrow[0]) else "float32"

    @property
    def weights(self) -> int:
        """The number of weights of the model."""
        return sum(math.prod(shape) for name, shape, _, _ in self.tensors if name != _ROPE_FACTORS)

    @property
    def chat_template(self) -> str | None:
        """The Jinja chat template, if there is one."""
        return self.metadata.get("tokenizer.chat_template")


def _floats_fit(file: GgufFile, dtype: str) -> bool:
    """Whether a dtype of 16 bits holds the file's float32 weights, mostly those of norms, without rounding."""
    import numpy
    import torch

    narrow = getattr(torch, dtype)
    for name, shape, kind, offset in file.tensors:
        if kind == 0 and name != _ROPE_FACTORS:
            numbers = numpy.memmap(file.path, "<f4", "c", file.data_start + offset, (math.prod(shape),))
            parts = torch.from_numpy(numbers).split(1 << 24)
            if not all(torch.equal(part.to(narrow).float(), part) for part in parts):
                return False
    return True


def is_gguf(path: str | Path) -> bool:
    """Whether a path is a file in GGUF format, by its first bytes; those that Ollama keeps have no suffix."""
    try:
        with Path(path).expanduser().open("rb") as file:
            return file.read(4) == _MAGIC
    except (OSError, ValueError):
        return False


def read_gguf(path: str | Path) -> GgufFile:
    """Reads the header.

    Raises:
        ValueError: it is cut off, damaged, or of a version that transformers does not know; the message says which.
    """
    from transformers.integrations.gguf import reader

    file = Path(path).expanduser()
    try:
        content = reader._mapped(str(file))
        metadata, count, position = reader._read_metadata(content, str(file))
        tensors, end = reader._read_tensor_table(content, count, position)
    except (struct.error, UnicodeDecodeError, IndexError, OverflowError, MemoryError):
        raise ValueError("its header is cut off or damaged; copy or download it again") from None
    alignment = metadata.get("general.alignment", 32)
    return GgufFile(file, metadata, tuple(tensors), -(-end // alignment) * alignment)


def check_package(name: str, path: str) -> list[Problem]:
    """Checks that the package gguf is installed, which transformers reads GGUF files with."""
    if importlib.util.find_spec("gguf") is not None:
        return []
    return refusal(
        f"{name} {path!r} is read by the package gguf, which is not installed: pip install -r requirements.txt",
        *([name.removeprefix("--")] if name.startswith("--") else []),
    )


def check_gguf(name: str, path: str) -> list[Problem]:
    """Checks that a GGUF file is complete and holds a model with its tokenizer that transformers can read.

    Args:
        name: the flag it came by, or what it is called in messages.
        path: the file.

    Returns:
        the problems.
    """
    flags = [name.removeprefix("--")] if name.startswith("--") else []
    what = f"{name} {path!r}"
    try:
        file = read_gguf(path)
    except (ValueError, OSError) as error:
        return refusal(f"{what} cannot be read as GGUF: {error}", *flags)
    found = _check_kind(file) or _check_size(file) or _check_tokenizer(file) or _check_model(file)
    return [Problem(f"{what} {problem}", flags=tuple(flags)) for problem in found]


def _check_kind(file: GgufFile) -> list[str]:
    """What the file holds: a whole model, of an architecture and in types that transformers knows."""
    kind, parts = file.metadata.get("general.type", "model"), file.metadata.get("split.count", 1)
    if file.architecture == "clip" or kind == "mmproj":
        return ["is a vision projector (mmproj), not a language model; give the GGUF file of the model itself"]
    if kind == "adapter":
        return ["is a LoRA adapter; give the GGUF file of its base"]
    if parts > 1:
        return [f"is one of {parts} parts of a model; join them with llama.cpp's llama-gguf-split --merge"]
    if not file.tensors:
        return ["holds no weights; give the GGUF file of a model"]
    known = _architectures()
    if file.architecture not in known:
        return [f"has the architecture {file.architecture!r}, and transformers reads {', '.join(known)}; {_GIVE}"]
    types = _readable_types(file.architecture)
    unknown = sorted({kind for _, _, kind, _ in file.tensors} - set(types))
    if unknown:
        names = ", ".join(map(_type_name, unknown))
        return [f"is quantised as {names}, and transformers reads {', '.join(map(_type_name, types))}; {_GIVE}"]
    return []


def _architectures() -> list[str]:
    """llama.cpp's names of the architectures of which transformers 5.23 reads language models."""
    from transformers.integrations.gguf import GGUF_ARCHS
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    # transformers' names that are not llama.cpp's, encoders, and sections of a file that are no architecture
    other = {"general", "tokenizer", "mistral", "t5", "umt5", "qwen2_moe", "qwen3_moe", "gpt_oss", "minimax_m2"}
    spelled = {"qwen2moe", "qwen3moe", "gpt-oss", "minimax-m2"}
    return sorted({*GGUF_SUPPORTED_ARCHITECTURES, *GGUF_ARCHS, *spelled} - other)


def _readable_types(architecture: str) -> list[int]:
    """ggml's types that transformers 5.23 dequantises: by itself for new architectures, else by the package gguf."""
    from gguf import GGMLQuantizationType
    from transformers.integrations.gguf import is_gguf_arch_supported
    from transformers.integrations.gguf.dequant import GGML_BLOCK

    if is_gguf_arch_supported(architecture):
        return sorted({*FLOATS, *GGML_BLOCK})
    return sorted({*FLOATS, *(int(kind) for kind in GGMLQuantizationType if _is_dequantised(kind))})


def _is_dequantised(kind) -> bool:
    """Whether the package gguf dequantises a type; tried on one block of zeros."""
    import numpy
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    try:
        dequantize(numpy.zeros((1, GGML_QUANT_SIZES[kind][1]), numpy.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _type_name(kind: int) -> str:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType(kind).name if kind in set(GGMLQuantizationType) else f"type {kind}"


def _check_size(file: GgufFile) -> list[str]:
    """Whether all tensors lie within the file."""
    from gguf import GGML_QUANT_SIZES

    end = file.data_start
    for _, shape, kind, offset in file.tensors:
        weights, size = GGML_QUANT_SIZES[kind]
        end = max(end, file.data_start + offset + math.prod(shape) // weights * size)
    size = file.path.stat().st_size
    if size < end:
        return [f"is cut off: it has {size:,} bytes, and its header says {end:,}; copy or download it again"]
    return []


def _check_tokenizer(file: GgufFile) -> list[str]:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_TOKENIZER_TYPES

    kind = file.metadata.get("tokenizer.ggml.model")
    if kind is None or not file.metadata.get("tokenizer.ggml.tokens"):
        return [f"has no tokenizer inside; {_GIVE}"]
    if kind not in GGUF_TOKENIZER_TYPES:
        return [f"has a tokenizer of the kind {kind!r}, and transformers reads {', '.join(GGUF_TOKENIZER_TYPES)}; "
                f"{_GIVE}"]  # fmt: skip
    return []


def other_split(file: GgufFile) -> str | None:
    """The name of the file's rule for splitting text, if transformers takes GPT-2's instead; None if it has it."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    rule = file.metadata.get("tokenizer.ggml.pre", "default")
    by_rule = file.metadata.get("tokenizer.ggml.model") == "gpt2"
    return rule if by_rule and rule not in (*_LIKE_GPT2, *_DIGITS_ALONE, *GGUF_PRE_TOKENIZER_SPLITS) else None


def split_digits(tokenizer, file: GgufFile) -> None:
    """Has a tokenizer take each digit by itself, where the file's rule does: `"\\n\\n 5"` → `["\\n\\n", " ", "5"]`."""
    from tokenizers import pre_tokenizers

    if file.metadata.get("tokenizer.ggml.pre") in _DIGITS_ALONE:
        digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])


# ---------------------------------------------------------------------- the model that transformers makes of it


@contextlib.contextmanager
def linked(file: Path) -> Iterator[str]:
    """Yields a temporary folder with a link `model.gguf` to a file: transformers wants a folder, and that suffix."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.gguf").symlink_to(file.resolve())
        yield folder


def gguf_config(folder: str, file: GgufFile):
    """Makes transformers' configuration of a GGUF file.

    Args:
        folder: with a link `model.gguf` to the file.
        file: its header.

    Returns:
        transformers.PretrainedConfig
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, gguf_file="model.gguf")
    factors = _rope_factors(file)
    if factors and (rope := _llama3_rope(factors, config)):
        config.rope_parameters = {"rope_theta": _theta(config), **rope}
    return config


def _check_model(file: GgufFile) -> list[str]:
    """Whether transformers' model has the file's weights and computes with its settings.

    transformers 5.23 passes over weights and settings that it does not know, without a word.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with linked(file.path) as folder, torch.random.fork_rng(devices=[]), torch.device("meta"):
            config = gguf_config(folder, file)
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers' readers raise their own
        return [f"cannot be read by transformers ({first_line(error)}); {_GIVE}"]
    weights = sum(weight.numel() for weight in {id(w): w for w in model.state_dict(keep_vars=True).values()}.values())
    if weights != file.weights:
        return [
            f"holds {file.weights:,} weights, and transformers' {type(model).__name__} has {weights:,}, so some would "
            f"be left out or missing; {_GIVE}"
        ]
    unread = _unread_settings(file, config)
    if unread:
        return [f"has settings that transformers does not read: {', '.join(unread)}; {_GIVE}"]
    return []


def _unread_settings(file: GgufFile, config) -> list[str]:
    """The settings of the model that transformers does not take from the file, and does not have by default."""
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
    from transformers.modeling_gguf_pytorch_utils import GGUF_TO_TRANSFORMERS_MAPPING

    if file.architecture in GGUF_CONFIG_ARCHS:  # read completely
        return []
    known = GGUF_TO_TRANSFORMERS_MAPPING["config"]
    read = known.get(file.architecture) or known[file.architecture.replace("moe", "_moe").replace("-", "_")]
    found = []
    for key, value in file.metadata.items():
        section, _, name = key.partition(".")
        if section != file.architecture or read.get(name) is not None:
            continue
        same = _theta(config) if name == "rope.freq_base" else _field(config, _SAME_AS.get(name))
        if not (same is not None and math.isclose(value, same, rel_tol=1e-6)):
            found.append(f"{name} {value}")
    if factors := _rope_factors(file):
        found += [] if _llama3_rope(factors, config) else [f"{_ROPE_FACTORS} (factors up to {max(factors):g})"]
    return found


def _field(config, name: str | None):
    """A field of the configuration; the head's size from the width, where it is not a field."""
    if name is None:
        return None
    value = getattr(config, name, None)
    return config.hidden_size // config.num_attention_heads if value is None and name == "head_dim" else value


def _theta(config) -> float:
    return (getattr(config, "rope_parameters", None) or {}).get("rope_theta", 0.0)


def _rope_factors(file: GgufFile) -> list[float]:
    """By what each frequency of the rotary embedding is divided; empty if the file has no such tensor."""
    import numpy

    for name, shape, kind, offset in file.tensors:
        if name == _ROPE_FACTORS and kind == 0:
            at = file.data_start + offset
            return numpy.fromfile(file.path, "<f4", math.prod(shape), offset=at).tolist()
    return []


def _llama3_rope(factors: list[float], config) -> dict | None:
    """The rope parameters of Llama 3.1, 3.2 and 3.3 that give these factors; None if none do.

    llama.cpp stores the factors, and transformers computes them from the parameters, which are not in the file: those
    models have the wavelengths 8192 and 8192 / 4 as limits, and differ in the factor.
    """
    low, high, context, factor = 1.0, 4.0, 8192, max(factors)
    expected = []
    for index in range(len(factors)):
        wavelength = 2 * math.pi * _theta(config) ** (2 * index / _field(config, "head_dim"))
        smooth = min(1.0, max(0.0, (context / wavelength - low) / (high - low)))
        expected.append(1 / ((1 - smooth) / factor + smooth))
    if not all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(factors, expected, strict=True)):
        return None
    return {
        "rope_type": "llama3",
        "factor": round(factor, 6),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }
