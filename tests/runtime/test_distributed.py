"""Ranks and launchers, and collective operations in a single process."""

import os
import socket
from types import SimpleNamespace

import pytest

from utils.runtime import distributed

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CROSS_SIZE", "ACCELERATE_USE_FSDP")


@pytest.fixture(autouse=True)
def without_launcher(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_a_plain_process_is_the_only_one():
    assert distributed.world_size() == 1 and distributed.is_local_main_process()
    assert not distributed.started_by_deepspeed() and not distributed.uses_fsdp()
    assert distributed.launcher_parent_pid() is None


def test_launchers_are_known_by_their_variables(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("CROSS_SIZE", "1")
    assert distributed.world_size() == 8 and not distributed.is_local_main_process()
    assert distributed.started_by_deepspeed()
    for value, expected in (("true", True), ("1", True), ("TRUE", True), ("false", False), ("0", False)):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", value)
        assert distributed.uses_fsdp() is expected


def test_a_single_process_gets_the_variables_of_a_launcher_and_a_free_port():
    distributed.set_single_process_env()
    assert [os.environ[name] for name in NAMES[:4]] == ["0", "0", "1", "127.0.0.1"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", int(os.environ["MASTER_PORT"])))


def test_the_variables_of_a_launcher_are_kept(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    distributed.set_single_process_env()
    assert os.environ["RANK"] == "2" and os.environ["WORLD_SIZE"] == "4" and "MASTER_PORT" not in os.environ


def test_collective_operations_return_the_own_value_in_a_single_process():
    value = object()
    assert distributed.broadcast_object(value) is value
    assert distributed.all_gather_objects([1, value]) == [1, value]
    assert [distributed.any_rank(flag, None) for flag in (True, False)] == [True, False]
    distributed.wait_for_everyone()
    distributed.exit_process(3)  # the caller exits by itself


def test_the_zero_stage_is_that_of_the_plugin():
    plugin = SimpleNamespace(zero_stage=3)
    assert distributed.zero_stage(SimpleNamespace(deepspeed_plugin=plugin)) == 3
    assert distributed.zero_stage(SimpleNamespace(deepspeed_plugin=None)) == 0
