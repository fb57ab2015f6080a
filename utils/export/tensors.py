"""The tensors in a base's files: their dtypes, kept by a merge, and those absent from the merged model."""

import json
from collections import Counter
from pathlib import Path

from utils.storage.files import replace_file
from utils.storage.weights import read_header, weight_files

# dtype names of safetensors → those of torch, of the dtypes that models compute in
FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
_COMPUTED = ("rotary_emb.inv_freq", "attn.bias", "masked_bias")  # buffers that old files hold and models compute


def tensors_of(folder: str | Path) -> dict[str, tuple[Path, dict]]:
    """Name → (file, header entry) of each tensor in a folder's safetensors files."""
    return {name: (file, entry) for file in weight_files(folder) for name, entry in read_header(file)[0].items()}


def main_type(folder: str | Path) -> str | None:
    """The floating dtype of most of a base's bytes, such as `"bfloat16"`; None if it has no files."""
    sizes: Counter = Counter()
    for _, entry in tensors_of(folder).values():
        if entry["dtype"] in FLOATS:
            sizes[FLOATS[entry["dtype"]]] += entry["data_offsets"][1] - entry["data_offsets"][0]
    return sizes.most_common(1)[0][0] if sizes else None


def load_exactly(model, base: str) -> None:
    """Restores the dtype and value of weights that the base's files hold in another dtype than the model.

    from_pretrained loads all weights in one dtype, which rounds, for example, a router in float32 among bfloat16.

    Args:
        model: loaded from `base`.
        base: its folder.
    """
    import torch

    stored = tensors_of(base)
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        file, entry = stored.get(name, (None, {"dtype": None}))
        wanted = getattr(torch, FLOATS.get(entry["dtype"], ""), None)
        if wanted not in (None, weight.dtype) and list(weight.shape) == entry["shape"]:
            weight.data = _read(file, name)


def keep_types(folder: Path, base: str, main: str | None) -> None:
    """Rewrites saved files so that each tensor has its dtype in the base, and unchanged ones the base's exact values.

    Args:
        folder: of the merged model.
        base: the folder it was merged from.
        main: the base's dtype that `--dtype` converts; its tensors stay as they were saved. None to convert none.
    """
    from safetensors.torch import load_file, save_file

    stored = {
        name: (file, entry)
        for name, (file, entry) in tensors_of(base).items()
        if FLOATS.get(entry["dtype"]) not in (None, main)
    }
    for file in weight_files(folder):
        header = read_header(file)[0]
        changed = [name for name in header if _differs(header[name], stored.get(name))]
        if not changed:
            continue
        tensors = load_file(file)
        for name in changed:
            original = _read(stored[name][0], name)
            same = original.to(tensors[name].dtype).equal(tensors[name])
            tensors[name] = original if same else tensors[name].to(original.dtype)
        with replace_file(file) as part:
            save_file(tensors, part, metadata={"format": "pt"})
    _correct_index(folder)


def absent_tensors(model, folder: Path, base: str) -> list[str]:
    """The names of tensors that the base's files hold and a merged model lacks, as transformers does not load them.

    Such as the layers of multi-token prediction in DeepSeek-V3 and GLM-4.5. Tied weights, which are saved once, and
    base models saved without their prefix (`h.0` for `transformer.h.0`) are not absent.

    Args:
        model: the merged model.
        folder: its saved files.
        base: the folder it was merged from.
    """
    prefix = f"{model.base_model_prefix}."
    present = {name.removeprefix(prefix) for name in [*tensors_of(folder), *model.state_dict()]}
    names = [name for name in tensors_of(base) if not name.endswith(_COMPUTED)]
    return sorted(name for name in names if name.removeprefix(prefix) not in present)


def _differs(saved: dict, original: tuple[Path, dict] | None) -> bool:
    return original is not None and original[1]["shape"] == saved["shape"] and original[1]["dtype"] != saved["dtype"]


def _read(file: Path, name: str):
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)


def _correct_index(folder: Path) -> None:
    file = folder / "model.safetensors.index.json"
    if not file.is_file():
        return
    index = json.loads(file.read_text(encoding="utf-8"))
    entries = [entry for _, entry in tensors_of(folder).values()]
    index.get("metadata", {})["total_size"] = sum(
        entry["data_offsets"][1] - entry["data_offsets"][0] for entry in entries
    )
    file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
