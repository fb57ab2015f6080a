"""Reads pickled checkpoint files without running code that they may contain.

transformers reads a checkpoint's optimizer, schedule and random state with `torch.load(weights_only=True)`, and PEFT an
adapter. DeepSpeed reads its states with `weights_only=False`, and torch the index of FSDP's divided states by `pickle`.
"""

import importlib
import importlib.util
import pickle
import zipfile
from pathlib import Path

from utils.runtime.errors import UserError, in_one_line

# what DeepSpeed's own states hold beside tensors: classes that keep figures, and run nothing when they are made
DEEPSPEED = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
# the same of random states, as transformers allows them
_NUMPY = ("numpy.ndarray", "numpy.dtype", "numpy._core.multiarray._reconstruct", "numpy.dtypes.UInt32DType")
# and of the index of FSDP's divided states
_INDEX = {
    "torch.distributed.checkpoint.metadata": None,  # every class that is defined there
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
}
_READ_BY_NOBODY = "training_args.bin"
_SUFFIXES = (".pt", ".pth", ".bin")


def check_pickles(folder: Path) -> list[str]:
    """Checks a checkpoint for files that would run code when they are unpickled, without unpickling them.

    Args:
        folder: the checkpoint.

    Returns:
        the problems, each naming the file and the code.
    """
    problems = []
    for file in sorted(folder.rglob("*")):
        if file.name == _READ_BY_NOBODY or not file.is_file():
            continue
        try:
            found = _foreign_in_state(file) if file.suffix in _SUFFIXES else _foreign_in_index(file)
            reason = f"would run code when it is read ({', '.join(sorted(found))})" if found else None
        except Exception as error:  # a damaged file raises anything
            reason = f"cannot be read as the state of a training ({_first_line(error)})"
        if reason:
            problems.append(
                f"{str(file)!r} {reason}; give a checkpoint that a run of this project wrote and nobody changed, or "
                "start from the weights alone (--model_name_or_path, --adapter_name_or_path)"
            )
    return problems


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {in_one_line(error, 200)}"


def _foreign_in_state(file: Path) -> set[str]:
    """Returns the names in a file of `torch.save` that are not allowed."""
    from torch.serialization import get_unsafe_globals_in_checkpoint

    if zipfile.is_zipfile(file):
        return {*get_unsafe_globals_in_checkpoint(file)} - {*DEEPSPEED, *_NUMPY}
    load_state(file, "cpu")  # torch's older form, which cannot be looked at without reading
    return set()


def _foreign_in_index(file: Path) -> set[str]:
    """The same for `.metadata`, the index that torch.distributed.checkpoint writes; empty for other files."""
    if file.name != ".metadata":
        return set()
    with file.open("rb") as opened:
        reader = _IndexReader(opened)
        try:
            reader.load()
        except pickle.UnpicklingError:
            if not reader.foreign:
                raise
    return reader.foreign


class _IndexReader(pickle.Unpickler):
    """Unpickles an index with its own classes only; `find_class` is called for every name in a pickle."""

    def __init__(self, file):
        super().__init__(file)
        self.foreign: set[str] = set()

    def find_class(self, module: str, name: str):
        if module in _INDEX and "." not in name and name in (_INDEX[module] or {name}):
            found = super().find_class(module, name)
            if _INDEX[module] or getattr(found, "__module__", None) == module and isinstance(found, type):
                return found
        self.foreign.add(f"{module}.{name}")
        raise pickle.UnpicklingError(f"{module}.{name} is not part of an index")


def load_state(file: str | Path, map_location=None):
    """Loads a state written by DeepSpeed or `torch.save` without running code.

    Raises:
        pickle.UnpicklingError: it holds more than tensors, figures and DeepSpeed's own classes.
    """
    import torch
    from transformers.trainer_pt_utils import safe_globals

    allowed = []
    for name in DEEPSPEED if importlib.util.find_spec("deepspeed") else ():
        module, _, attribute = name.rpartition(".")
        allowed.append(getattr(importlib.import_module(module), attribute))
    with safe_globals(), torch.serialization.safe_globals(allowed):
        return torch.load(file, map_location=map_location, weights_only=True)


def use_safe_deepspeed_load() -> None:
    """Replaces `load` of DeepSpeed's checkpoint engine, which in 0.19 unpickles any object (`weights_only=False`)."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    def load(self, path, map_location=None):
        try:
            return load_state(path, map_location)
        except pickle.UnpicklingError as error:
            message = f"the checkpoint's file {str(path)!r} cannot be read without running code: {_first_line(error)}"
            raise UserError(message) from None

    TorchCheckpointEngine.load = load
