"""Plants faults in the code, one at a time, and prints which of them the tests do not notice.

    python tests/mutants.py                          # every fault of tests/faults.py
    python tests/mutants.py --only softcap --only bias    # those whose name holds one of these texts
    python tests/mutants.py --changed main           # those in files that differ from a git revision
    python tests/mutants.py --check                  # only whether each text still stands where it is to be replaced
    python tests/mutants.py --list                   # their names, files and tests; nothing runs

Each fault is a text in a file and what it is replaced by. It is planted in a copy of the project, the few tests that
are to notice it run there, and the file is put back. A fault is

- killed: a test failed, as it should
- SURVIVED: all of them passed, so they do not see this part of the code
- BROKEN: its text does not stand in the file exactly once, or its tests do not run or fail without it as well

Exits with 1 where more than 5 % survive or one is broken. Those known to change nothing that can be observed carry a
reason; they are printed, and neither run nor counted.

The libraries are imported once: each run of tests is a fork of this process, with caches of its own.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parent.parent
MOST_SURVIVING = 0.05
PATIENCE = 240  # seconds for the tests of one fault; one that hangs is noticed, too
_NO_TESTS = {2: "were interrupted", 3: "had an internal error", 4: "could not be found", 5: "collected nothing"}


class Outcome(NamedTuple):
    """What became of a fault: `killed`, `SURVIVED` or `BROKEN`, with what is to be said of it."""

    fault: Fault
    state: str
    seconds: float
    reason: str = ""

    def __str__(self) -> str:
        more = f": {self.reason}" if self.reason else ""
        return f"{self.state:8}  {self.seconds:5.1f} s  {self.fault.name} ({self.fault.file}){more}"


def import_libraries() -> None:
    """Imports what the tests need, as tests/conftest.py would have it; nothing of this project."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="dojo-hf-")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    os.environ.setdefault("DOJO_TOKENIZERS", str(ROOT.parent / "shared/reference/tokenizers"))
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # a fault of the same length in the same second would not be compiled
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(ROOT))
    from utils.patches.lazy_imports import import_peft

    import_peft()
    import datasets  # noqa: F401
    import matplotlib
    import pytest  # noqa: F401
    from transformers import AutoModelForCausalLM, Trainer  # noqa: F401
    from trl import DPOTrainer, SFTTrainer  # noqa: F401

    matplotlib.use("Agg")
    sys.path.remove(str(ROOT))
    for name in [name for name in sys.modules if name.split(".")[0] == "utils"]:
        del sys.modules[name]


def run_tests(tree: Path, tests: str) -> tuple[int, str]:
    """Runs tests in a fork, with a folder for whatever they write.

    Returns:
        pytest's exit code, or -1 where they took too long; the last lines of what it printed.
    """
    scratch = Path(tempfile.mkdtemp(dir=tree.parent))
    sys.stdout.flush()
    child = os.fork()
    if not child:
        try:
            os.setsid()
            _run_pytest(tree, scratch, tests)
        finally:
            os._exit(3)
    try:
        code = _wait(child)
        text = (scratch / "out.txt").read_text(encoding="utf-8", errors="replace") if code != -1 else ""
        return code, " | ".join(text.strip().splitlines()[-3:])
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _run_pytest(tree: Path, scratch: Path, tests: str) -> None:
    import shlex

    import datasets
    import pytest

    output = os.open(scratch / "out.txt", os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ["TMPDIR"] = str(scratch)
    tempfile.tempdir = None
    datasets.config.HF_DATASETS_CACHE = scratch / "datasets"  # rows that another fault has prepared are not taken
    os.chdir(tree)
    here = str(ROOT / "tests")
    sys.path[:] = [path for path in sys.path if path and path != here]
    options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--no-header", "--disable-warnings"]
    code = pytest.main([*options, *shlex.split(tests)])
    sys.stdout.flush()
    os._exit(int(code))


def _wait(child: int) -> int:
    end = time.monotonic() + PATIENCE
    try:
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        return -1
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what the tests started as well


_tree: Path | None = None
_passed: set[str] = set()  # tests that pass without any fault


def start_worker(folder: str) -> None:
    """Makes the copy of the project that this process plants faults in."""
    global _tree
    _tree = Path(tempfile.mkdtemp(dir=folder)) / "tree"
    shutil.copytree(ROOT, _tree, ignore=shutil.ignore_patterns(".git", "__pycache__", "output", ".*cache"))


def misplaced(fault: Fault, root: Path) -> str | None:
    """What is wrong with where a fault is to be planted; None where its text stands there exactly once."""
    file = root / fault.file
    count = file.read_text(encoding="utf-8").count(fault.old) if file.is_file() else 0
    if count == 1:
        return None
    return f"its text stands {count} times in {fault.file}: {fault.old.strip().splitlines()[0]}"


def try_fault(fault: Fault, check_first: bool = True) -> Outcome:
    """Plants one fault and has its tests look for it.

    Args:
        fault: which.
        check_first: whether the tests run without it before, which tells a fault that is noticed from a broken test.
    """
    started = time.monotonic()

    def outcome(state: str, reason: str = "") -> Outcome:
        return Outcome(fault, state, time.monotonic() - started, reason)

    if reason := misplaced(fault, _tree):
        return outcome("BROKEN", reason)
    if check_first and fault.tests not in _passed:
        code, said = run_tests(_tree, fault.tests)
        if code:
            return outcome("BROKEN", f"its tests {_NO_TESTS.get(code, 'fail without it')}: {fault.tests}: {said}")
        _passed.add(fault.tests)
    file = _tree / fault.file
    text = file.read_text(encoding="utf-8")
    try:
        file.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
        code, said = run_tests(_tree, fault.tests)
    finally:
        file.write_text(text, encoding="utf-8")
    if code == 0:
        return outcome("SURVIVED", fault.tests)
    if code in _NO_TESTS:
        return outcome("BROKEN", f"with it its tests {_NO_TESTS[code]}: {said}")
    return outcome("killed", "" if code == 1 else f"its tests ended with {code}")


def changed_since(revision: str) -> set[str]:
    """The files that differ from a revision of git."""
    command = ["git", "diff", "--name-only", revision]
    return set(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", help="faults whose name holds this text")
    parser.add_argument("--changed", metavar="REVISION", help="faults in files that differ from this git revision")
    parser.add_argument("--jobs", type=int, default=1, help="how many faults are tried at once")
    parser.add_argument("--suite-passed", action="store_true", help="the tests pass without a fault: half the time")
    parser.add_argument("--check", action="store_true", help="see whether each can still be planted and run nothing")
    parser.add_argument("--list", action="store_true", help="print the faults and run nothing")
    args = parser.parse_args()
    files = changed_since(args.changed) if args.changed else None
    faults = [fault for fault in FAULTS if not args.only or any(text in fault.name for text in args.only)]
    faults = [fault for fault in faults if files is None or fault.file in files]
    if not faults:
        parser.error("no fault is chosen")
    for fault in faults:
        if args.list or fault.equivalent:
            print(f"{fault.name} ({fault.file}): {fault.equivalent or fault.tests}")
    faults = [fault for fault in faults if not fault.equivalent]
    if args.list:
        return 0
    if args.check:
        wrong = [Outcome(fault, "BROKEN", 0.0, reason) for fault in faults if (reason := misplaced(fault, ROOT))]
        print("\n".join([*map(str, wrong), f"{len(faults) - len(wrong)} of {len(faults)} faults can be planted"]))
        return int(bool(wrong))
    import_libraries()
    started, outcomes = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        context = get_context("fork")
        with ProcessPoolExecutor(args.jobs, context, initializer=start_worker, initargs=(folder,)) as pool:
            for outcome in pool.map(partial(try_fault, check_first=not args.suite_passed), faults):
                print(outcome, flush=True)
                outcomes.append(outcome)
    return summarise(outcomes, time.monotonic() - started)


def summarise(outcomes: list[Outcome], seconds: float) -> int:
    """Prints how many were noticed; returns the exit code."""
    count = {state: sum(one.state == state for one in outcomes) for state in ("killed", "SURVIVED", "BROKEN")}
    tried = count["killed"] + count["SURVIVED"]
    share = count["SURVIVED"] / tried if tried else 0.0
    print(
        f"{count['killed']} of {tried} faults killed, {count['SURVIVED']} survived ({100 * share:.1f} %, allowed are "
        f"{100 * MOST_SURVIVING:.0f} %), {count['BROKEN']} broken; {seconds:.0f} s"
    )
    return int(share > MOST_SURVIVING or count["BROKEN"] > 0)


if __name__ == "__main__":
    sys.exit(main())
