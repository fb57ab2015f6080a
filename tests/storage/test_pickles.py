"""A checkpoint from someone else: a pickle in it that runs code when it is read never does."""

import inspect
import json
import os
import pickle
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from conftest import ROOT

import main_train
from utils.storage.pickles import DEEPSPEED, check_pickles, load_state, use_safe_deepspeed_load
from utils.storage.run_folder import MANIFEST

needs_deepspeed = pytest.mark.skipif(not find_spec("deepspeed"), reason="needs deepspeed")


class Evil:
    """Leaves a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.fixture
def mark(tmp_path):
    return tmp_path / "ran"


def sizes_noted_again(checkpoint):
    """The list of a checkpoint's files with the sizes they have now: it comes with the folder, and proves nothing."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    names = [str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()]
    manifest["files"] = {name: (checkpoint / name).stat().st_size for name in names if name != MANIFEST}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


@pytest.fixture
def checkpoint(copied):
    """A checkpoint of a run of two updates."""
    return copied("--max_steps", "2", "--save_steps", "1", "--save_strategy", "steps") / "checkpoint-1"


def command_of(checkpoint, *flags):
    record = json.loads((checkpoint.parent / "train_args.json").read_text())
    names = ("model_name_or_path", "train_data_path")
    return [
        *(word for name in names for word in (f"--{name}", record["common"][name])),
        "--num_train_epochs", "2", "--per_device_train_batch_size", "4", "--report_to", "none", "--save_strategy", "no",
        "--card_samples", "0", "--max_steps", "2", "--output_dir", f"{checkpoint.parent}-again",
        "--resume_from_checkpoint", str(checkpoint), *flags,
    ]  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older form"])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin", "a/b.pt"])
def test_a_state_that_runs_code_is_refused_before_anything_loads(checkpoint, refused, mark, name, zipped):
    (checkpoint / "a").mkdir()
    torch.save({"state": Evil(mark)}, checkpoint / name, _use_new_zipfile_serialization=zipped)
    sizes_noted_again(checkpoint)
    said = refused(main_train.main, *command_of(checkpoint))
    assert f"{checkpoint / name}" in said and "give a checkpoint that a run of this project wrote" in said
    assert ("would run code when it is read (io.open)" in said) == zipped
    assert not mark.exists()


def test_what_nobody_reads_does_no_harm_and_a_checkpoint_of_ones_own_is_taken(checkpoint, mark):
    torch.save(Evil(mark), checkpoint / "training_args.bin")
    sizes_noted_again(checkpoint)
    assert check_pickles(checkpoint) == []
    main_train.main(command_of(checkpoint))
    again = checkpoint.parent.with_name(f"{checkpoint.parent.name}-again")
    assert json.loads((again / "trainer_state.json").read_text())["global_step"] == 2 and not mark.exists()


def test_a_damaged_state_is_named(checkpoint, refused):
    file = checkpoint / "optimizer.pt"
    file.write_bytes(b"PK\x03\x04" + file.read_bytes()[4:900] + bytes(file.stat().st_size - 900))
    said = refused(main_train.main, *command_of(checkpoint))
    assert "optimizer.pt' cannot be read as the state of a training" in said


def test_an_index_of_divided_states(tmp_path, mark):
    import torch.distributed.checkpoint as dcp

    kinds = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    state = {str(kind): torch.ones(3, 2).to(kind) for kind in kinds}
    dcp.save({**state, "step": 3, "groups": [{"lr": 0.1}]}, checkpoint_id=tmp_path / "own")
    assert check_pickles(tmp_path / "own") == []
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / ".metadata").write_bytes(pickle.dumps(Evil(mark)))
    assert "would run code when it is read (io.open)" in check_pickles(tmp_path / "theirs")[0]
    # a name that is only reached through a module that an index may use
    for name in (
        "torch.distributed.checkpoint.metadata\nos.system",
        "torch.distributed.checkpoint.metadata\ndataclass",
    ):
        (tmp_path / "theirs" / ".metadata").write_bytes(f"c{name}\n(S'x'\ntR.".encode())
        assert "would run code" in check_pickles(tmp_path / "theirs")[0]
    assert not mark.exists()


@needs_deepspeed
def test_deepspeed_reads_its_states_without_running_code(tmp_path, mark):
    """The contract with DeepSpeed: one engine, whose load has these arguments, and states of these classes."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    assert list(inspect.signature(TorchCheckpointEngine.load).parameters) == ["self", "path", "map_location"]
    use_safe_deepspeed_load()
    state = {
        "loss_scaler": LossScaler(scale=2.0), "dynamic": DynamicLossScaler(4.0, 2.0, 10, 1.0, 1, False, False),
        "stage": ZeroStageEnum.gradients, "where": fragment_address(numel=3, start=1), "flat": [torch.arange(3.0)],
    }  # fmt: skip
    file = tmp_path / "states.pt"
    torch.save(state, file)
    load = TorchCheckpointEngine.load
    found = load(None, str(file), map_location=torch.device("cpu"))
    theirs = torch.load(file, weights_only=False)
    assert found["where"] == theirs["where"] and found["stage"] is theirs["stage"]
    assert vars(found["dynamic"]) == vars(theirs["dynamic"]) and torch.equal(found["flat"][0], theirs["flat"][0])
    assert found["loss_scaler"].loss_scale == 2.0 and check_pickles(tmp_path) == []
    for zipped in (True, False):
        torch.save(state | {"more": Evil(mark)}, file, _use_new_zipfile_serialization=zipped)
        with pytest.raises(pickle.UnpicklingError):
            load_state(file)
        with pytest.raises(Exception, match="cannot be read without running code"):
            load(None, str(file))
    assert not mark.exists()
    assert len(DEEPSPEED) == 4


def test_an_adapter_whose_weights_are_a_pickle_is_refused(checkpoint, mark, refused):
    from utils.script import infer, merge_lora

    (checkpoint / "adapter_model.safetensors").unlink()
    torch.save({"state": Evil(mark)}, checkpoint / "adapter_model.bin")
    for command, more in ((infer, ["--prompt", "Hi"]), (merge_lora, ["--output_dir", f"{checkpoint}-merged"])):
        said = refused(command.main, "--model_path", str(checkpoint), *more)
        assert "has no adapter_model.safetensors" in said and "save_pretrained(...) of PEFT" in said
    assert not mark.exists()


def test_an_adapter_on_top_of_itself_is_refused(checkpoint, refused):
    from utils.script import infer

    config = json.loads((checkpoint / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(checkpoint)
    (checkpoint / "adapter_config.json").write_text(json.dumps(config))
    assert "as its base, which is an adapter" in refused(infer.main, "--model_path", str(checkpoint), "--prompt", "Hi")


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.usefixtures("fast_processes")
@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_a_deepspeed_run_goes_on_from_its_own_states_and_from_no_others(stage, tmp_path, tiny_models, rows_file, mark):
    def run(*flags):
        command = [
            sys.executable, "main_train.py", "--model_name_or_path", tiny_models(), "--train_data_path", rows_file,
            "--output_dir", str(tmp_path / "run"), "--deepspeed", stage, "--per_device_train_batch_size", "4",
            "--save_strategy", "steps", "--save_steps", "1", "--max_steps", "2", "--report_to", "none",
            "--card_samples", "0", "--train_special_tokens", "off", *flags,
        ]  # fmt: skip
        return subprocess.run(command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True, timeout=500)

    first = run()
    assert first.returncode == 0, first.stderr
    checkpoint = tmp_path / "run" / "checkpoint-1"
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    again = run("--resume_from_checkpoint", "true")
    assert again.returncode == 0 and (tmp_path / "run" / "checkpoint-2").is_dir(), again.stderr
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    for file in checkpoint.glob("global_step*/*.pt"):
        state = torch.load(file, weights_only=False)
        torch.save({"first": Evil(mark), **state}, file)
    sizes_noted_again(checkpoint)
    foreign = run("--resume_from_checkpoint", "true")
    assert foreign.returncode == 2 and "would run code when it is read (io.open)" in foreign.stderr
    assert "Traceback" not in foreign.stderr and not mark.exists()
