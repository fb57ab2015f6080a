"""The environment that a run records: versions, hardware, and a command that starts as many processes."""

import importlib.metadata
import sys

import pytest

from utils.runtime.environment import LIBRARIES, hardware, launcher, versions


@pytest.mark.parametrize(
    ("variables", "command"),
    [
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, "torchrun --nproc_per_node 2 main_train.py"),
        ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, "torchrun --nnodes 2 --nproc_per_node 8 main_train.py"),
        ({"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "CROSS_SIZE": "1"}, "deepspeed --num_gpus 2 main_train.py"),
        ({"WORLD_SIZE": "16", "LOCAL_SIZE": "8", "CROSS_SIZE": "2"}, "deepspeed --hostfile hosts main_train.py"),
    ],
)
def test_the_command_starts_as_many_processes(variables, command, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launcher()["command"] == command


def test_fsdp_is_started_by_accelerate(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    config = "train_args/accelerate_config/fsdp.yaml"
    command = f"accelerate launch --config_file {config} --num_processes 4 main_train.py"
    assert launcher() == {"processes": 4, "command": command}


def test_a_plain_process_is_started_by_python():
    assert launcher() == {"processes": 1, "command": "python main_train.py"}


def test_versions_are_those_of_the_installed_libraries():
    assert versions() == {name: importlib.metadata.version(name) for name in LIBRARIES}


def test_the_hardware_of_this_machine():
    found = hardware()
    assert found["python"] == sys.version.split()[0] and found["memory"] > 10**8
    assert found["cores"] >= 1 and found["gpus"] == [] and found["cpu"]
