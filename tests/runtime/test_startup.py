"""What is settled before torch is imported, and that nothing imports it sooner."""

import subprocess
import sys

import pytest
from conftest import ROOT

from utils.runtime.startup import KERNEL_CACHE_SIZE, limit_kernel_caches

CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
COMMANDS = [
    "main_train",
    *(f"utils.script.{path.stem}" for path in sorted((ROOT / "utils" / "script").glob("[a-z]*.py"))),
]


@pytest.mark.parametrize("module", COMMANDS)
def test_a_command_imports_no_torch_before_the_caches_are_limited(module):
    code = f"import sys, {module}; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


def test_a_command_begins_with_limited_caches(monkeypatch):
    import os

    from utils.runtime.command import run_command

    for name in CACHES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    found = {}
    run_command(lambda: found.update({name: os.environ.get(name) for name in CACHES}))
    assert found == dict.fromkeys(CACHES, str(KERNEL_CACHE_SIZE))


def test_the_environment_has_the_last_word(monkeypatch):
    import os

    monkeypatch.setenv(CACHES[0], "7")
    monkeypatch.setenv(CACHES[1], "8")
    limit_kernel_caches()
    assert [os.environ[name] for name in CACHES] == ["7", "8"]
