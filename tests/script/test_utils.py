"""Every command can be started by its path, from any folder."""

import subprocess
import sys

from conftest import ROOT

SCRIPTS = sorted(path for path in (ROOT / "utils" / "script").glob("[a-z]*.py") if path.stem != "utils")
# as Python starts a script by its path: the script's folder is the first to import from
EACH = """
import runpy, sys
for script in sys.argv[2:]:
    sys.path[0] = sys.argv[1]
    for name in [name for name in sys.modules if name.partition(".")[0] == "utils"]:
        del sys.modules[name]
    assert callable(runpy.run_path(script, run_name="started")["main"])
    print(sys.modules["utils"].__path__[0])
"""


def test_every_script_finds_the_package_utils(tmp_path):
    words = [sys.executable, "-c", EACH, str(ROOT / "utils" / "script"), *map(str, SCRIPTS)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == [str(ROOT / "utils")] * len(SCRIPTS), done.stderr


def test_help_of_a_script_started_by_its_path(tmp_path):
    words = [sys.executable, str(ROOT / "utils" / "script" / "show_template.py"), "--help"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, "--name" in done.stdout) == (0, True), done.stderr
