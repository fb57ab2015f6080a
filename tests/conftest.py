"""Every test runs offline, with caches of its own and one thread: the models are tiny."""

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = sorted({path.parent for path in (ROOT / "tests").rglob("*.py")})  # helpers, and tests that share theirs
sys.path[:0] = [str(ROOT), *map(str, FOLDERS)]
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="dojo-hf-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import base64  # noqa: E402
import functools  # noqa: E402
import gc  # noqa: E402
import json  # noqa: E402
import shutil  # noqa: E402

import fork_server  # noqa: E402
import pytest  # noqa: E402
import tiny  # noqa: E402

# a valid PNG of one pixel
BLANK = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")


def pytest_collection_modifyitems(config, items):
    """Under xdist, puts files with slow tests first: short ones at the end keep every process busy until then."""
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def alone():
    """What `--deepspeed` sets for a process without a launcher ends with the test: later ones start processes."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ.get(name) for name in names}
    yield
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@functools.cache
def set_libraries_aside():
    """Has the garbage collector pass over all that is loaded: going through it takes as long as a short training."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def collector():
    """Sets the libraries aside after the first test that loaded them."""
    yield
    if "trl" in sys.modules:
        set_libraries_aside()


@pytest.fixture(autouse=True)
def pictures(request):
    """Draws a run's figures, but renders no picture of them, which takes longer than a short training.

    A test that needs the picture itself asks for the fixture `rendered`.
    """
    with pytest.MonkeyPatch.context() as patch:
        if "rendered" not in request.fixturenames:
            patch.setattr("utils.run.plot._save", _save_blank)
        yield


@pytest.fixture
def rendered():
    """Has the pictures rendered: for tests of the picture itself."""


def _save_blank(figure, panels, path):
    from matplotlib import pyplot

    pyplot.close(figure)
    path.write_bytes(BLANK)


@pytest.fixture
def fast_processes():
    """Makes `sys.executable`, and the launchers beside it, start programs whose libraries are imported already."""
    with fork_server.fast_processes():
        yield


@pytest.fixture
def real_processes(fast_processes, monkeypatch):  # after the fast ones, whose place it takes
    """In a module of fast processes: starts those of one test as a user does."""
    monkeypatch.setattr(sys, "executable", fork_server.PYTHON)


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE with the ChatML tokens."""
    return tiny.byte_level_tokenizer()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """architecture → the folder of a tiny random model, made once."""
    folders = {}

    def folder_of(architecture="qwen2", **changes):
        key = (architecture, tuple(sorted(changes.items())))
        if key not in folders:
            folders[key] = tiny.save_tiny_model(tmp_path_factory.mktemp(architecture), architecture, **changes)
        return folders[key]

    return folder_of


@pytest.fixture
def rows_file(tmp_path):
    """A jsonl file of SFT rows."""
    return write_rows(tmp_path / "rows.jsonl", tiny.ROWS)


def write_rows(path, rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """A run that knows three rows by heart, tiny.LEARNED: of whole weights, its base noted, long enough trained."""
    import main_train

    folder = tmp_path_factory.mktemp("learned")
    rows = [{"instruction": question, "output": answer} for question, answer in tiny.LEARNED]
    main_train.main(
        [
            "--model_name_or_path", tiny.save_tiny_model(folder / "base"),
            "--train_data_path", write_rows(folder / "rows.jsonl", rows), "--output_dir", str(folder / "run"),
            "--num_train_epochs", "60", "--learning_rate", "3e-3", "--report_to", "none",
            "--train_mode", "full", "--save_strategy", "no",
            "--disable_tqdm", "true", "--precision", "fp32",
        ]
    )  # fmt: skip
    found = state_of(folder)
    yield folder / "run"
    assert state_of(folder) == found, "a test changed this run, which all tests share"


def train_tiny(folder, model, data, *flags):
    """Runs main_train.py in this process; returns the run's folder.

    Its card has no answers, as they take as long as a short training; `--card_samples` asks for them.
    """
    import main_train

    main_train.main(
        [
            "--model_name_or_path", model, "--train_data_path", data, "--output_dir", str(folder),
            "--num_train_epochs", "2", "--per_device_train_batch_size", "4", "--report_to", "none",
            "--save_strategy", "no", "--disable_tqdm", "true", "--card_samples", "0", *flags,
        ]
    )  # fmt: skip
    return folder


@pytest.fixture
def train(tiny_models, rows_file, tmp_path):
    """`train(*flags)` → the folder of a new run on a tiny model, see `train_tiny`."""

    def run(*flags, model=None, data=None, output="run"):
        return train_tiny(tmp_path / output, model or tiny_models(), data or rows_file, *flags)

    return run


@pytest.fixture(scope="session")
def trained(tiny_models, tmp_path_factory):
    """`trained(*flags)` → the folder of a run that all tests share: trained once, and only read; see `copied`."""
    runs, found = {}, {}

    def run(*flags, rows=tiny.ROWS):
        key = (*flags, json.dumps(rows))
        if key not in runs:
            folder = tmp_path_factory.mktemp("trained")
            data = write_rows(folder / "rows.jsonl", rows)
            runs[key] = train_tiny(folder / "run", tiny_models(), data, *flags)
            found[key] = state_of(runs[key])
        return runs[key]

    yield run
    changed = [key[:-1] for key, folder in runs.items() if state_of(folder) != found[key]]
    assert not changed, f"a test changed a shared run; it should have `copied` it: {changed}"


def state_of(folder):
    """The files below a folder, each with its size and when it was written; not the log, which is open for longer."""
    paths = {str(path): path.stat() for path in folder.rglob("*") if path.is_file() and path.name != "train.log"}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in paths.items()}


@pytest.fixture
def copied(trained, tmp_path):
    """`copied(*flags, output="run")` → a copy of such a run in the test's own folder, to change or to resume."""

    def copy(*flags, output="run", **options):
        return shutil.copytree(trained(*flags, **options), tmp_path / output)

    return copy


@pytest.fixture
def parse(tiny_models, rows_file, tmp_path):
    """`parse(*flags)` → (CommonArgs, TrainArgument), with a model, rows and a folder that exist."""
    from utils.args import parse_args

    def run(*flags):
        paths = ["--model_name_or_path", tiny_models(), "--train_data_path", rows_file]
        return parse_args([*paths, "--output_dir", str(tmp_path / "run"), *flags])

    return run


@pytest.fixture
def refused(capsys):
    """Runs a command's `main` that must refuse its input; returns what it said."""
    from utils.runtime.command import run_command

    def run(main, *argv):
        with pytest.raises(SystemExit) as stop:
            run_command(lambda: main(list(argv)))
        said = capsys.readouterr().err
        assert stop.value.code == 2
        assert "Traceback" not in said
        return said

    return run
