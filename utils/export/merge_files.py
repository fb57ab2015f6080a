"""The types of a base's tensors as its files hold them, kept through loading and saving."""

import json
from collections import Counter
from pathlib import Path

from utils.storage.files import replace_file
from utils.storage.weights import read_header, weight_files

# safetensors' names of the types that weights are computed in → torch's
FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


def tensors_of(folder: str | Path) -> dict[str, tuple[Path, dict]]:
    """Name → (file, entry of its header), of each tensor in a folder's safetensors files."""
    return {name: (file, entry) for file in weight_files(folder) for name, entry in read_header(file)[0].items()}


def main_type(folder: str | Path) -> str | None:
    """The floating type that most bytes of a base have, such as `"bfloat16"`; None where there are no files."""
    sizes: Counter = Counter()
    for _, entry in tensors_of(folder).values():
        if entry["dtype"] in FLOATS:
            sizes[FLOATS[entry["dtype"]]] += entry["data_offsets"][1] - entry["data_offsets"][0]
    return sizes.most_common(1)[0][0] if sizes else None


def load_exactly(model, base: str) -> None:
    """Gives weights whose type in the base's files is not the one they were loaded in the files' own values.

    A model is loaded in one type, so that a router in float32 among weights in bfloat16 would be rounded.

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
    """Gives the tensors of saved files the type they have in the base's, and untouched ones the base's own bytes.

    Args:
        folder: what was saved.
        base: the folder it was made from.
        main: the base's type that was converted on purpose, which stays as it was saved; None for no type.
    """
    from safetensors.torch import load_file, save_file

    stored = {
        name: place for name, place in tensors_of(base).items() if FLOATS.get(place[1]["dtype"]) not in (None, main)
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
