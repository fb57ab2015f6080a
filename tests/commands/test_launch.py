"""The launchers, for real: two processes on the CPU, and two hosts in two network namespaces."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import tiny
from conftest import ROOT, write_rows
from pages import commands

from benchmarks.matrix import (
    COVERING,
    FSDP_FLAGS,
    PAGES,
    check,
    flags_of,
    free_port,
    one_process,
    problems_of,
    table,
    two_processes,
)
from utils.config.deepspeed import CONFIGS, NAMES

PAGE = "docs/launching.md"
ONE_MACHINE = commands(PAGE, "## One machine")
# the first starts the others by ssh
ON_EACH_MACHINE = commands(PAGE, "## Several machines")[1:]
(WITHOUT_A_GPU,) = commands(PAGE, "## Try it without a GPU")
SHORT = [
    "--max_steps", "2", "--per_device_train_batch_size", "2", "--precision", "fp32", "--logging_steps", "1",
    "--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "true", "--train_special_tokens", "off",
    "--card_samples", "0",
]  # fmt: skip
# one command of each launcher is started as a user does
REAL = [
    next(command for command in ONE_MACHINE if command.startswith(name)) for name in ("deepspeed", "torchrun", "acc")
]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fast_processes")]


@pytest.fixture
def flags(tiny_models, rows_file, tmp_path):
    run = ["--model_name_or_path", tiny_models(), "--train_data_path", rows_file, *SHORT]
    return [*run, "--output_dir", str(tmp_path / "run")]


def launched(command: str, flags: list[str], **changes) -> subprocess.CompletedProcess:
    """Runs a command of the page on the CPU, with the test's flags behind it."""
    words = shlex.split(command)
    while "=" in words[0]:
        changes |= [words.pop(0).split("=")]
    words[0] = str(Path(sys.executable).parent / words[0])
    # as many slots as the line names, and a port of its own
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "8", "OMP_NUM_THREADS": "1", **changes}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    if words[0].endswith("deepspeed") or words[0].endswith("torchrun"):
        words[1:1] = ["--master_port", free_port()]
    elif words[0].endswith("accelerate"):
        words[2:2] = ["--main_process_port", free_port()]
    return subprocess.run([*words, *flags], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("command", [*ONE_MACHINE, WITHOUT_A_GPU])
def test_every_command_of_the_page_trains(command, flags, tmp_path, request):
    if command in REAL:
        request.getfixturevalue("real_processes")
    done = launched(command, flags)
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout + done.stderr
    assert said.count("finished: ") == said.count("train data: prepared") == 1  # only the first process speaks
    assert said.count("'train_runtime'") == 1
    config = json.loads((tmp_path / "run" / "train_args.json").read_text(encoding="utf-8"))["trainer"]["deepspeed"]
    wanted = re.search(r"--deepspeed (\w+)", command)
    name = wanted[1] if wanted else "zero2" if "deepspeed " in command else None
    assert config == name  # by its short name, which is found again wherever the project lies
    rows = json.loads((tmp_path / "run" / "train_args.json").read_text(encoding="utf-8"))["summary"]
    assert rows["steps"] == 2 and (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "run" / "train.log").read_text(encoding="utf-8").count("step 1: loss") == 1


def test_bad_input_is_told_once_with_exit_code_2(flags, tmp_path):
    done = launched(ONE_MACHINE[0], [*flags, "--lora_rank", "0", "--max_lenn", "3"])
    said = done.stdout + done.stderr
    assert done.returncode == 2 and said.count("2 errors:") == 1 and "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_a_row_that_cannot_be_used_is_told_once(flags, tmp_path):
    data = write_rows(tmp_path / "bad.jsonl", [{"instruction": "Hi"}])
    done = launched(ONE_MACHINE[0], [*flags, "--train_data_path", data])
    said = done.stdout + done.stderr
    assert done.returncode == 2 and said.count("cannot be used") == 1 and "Traceback" not in said


def with_change(tmp_path, change: str) -> list[str]:
    """A script that changes something in one process and runs main_train.py in `tmp_path`."""
    script = tmp_path / "changed.py"
    script.write_text(
        f"import os, sys, time\nsys.path.insert(0, {str(ROOT)!r})\nrank = os.environ['RANK']\n{change}\n"
        "import main_train\nfrom utils.runtime.command import run_command\n"
        "sys.argv = [w for w in sys.argv if not w.startswith('--local_rank')]\nos.chdir(sys.argv.pop(1))\n"
        "run_command(main_train.main)\n"
    )
    return [str(script), str(tmp_path)]


def test_all_processes_take_the_first_ones_folder(flags, tmp_path):
    """Without --output_dir each process would name it by its own clock."""
    run = flags[: flags.index("--output_dir")]
    change = "if rank == '1':\n    time.strftime = lambda *a: '19990101-000000'"
    done = two_processes([*with_change(tmp_path, change), *run])
    assert done.returncode == 0, done.stderr[-2000:]
    (folder,) = (tmp_path / "output").iterdir()
    assert "1999" not in folder.name


def test_one_process_prepares_and_no_collective_waits_for_it(flags, tmp_path):
    """Preparing takes longer than collectives may; the other process must neither time out nor prepare by itself."""
    change = (
        "import utils.data.prepare as process\nprepare = process._prepare\n"
        "def slow(*args):\n    assert rank == '0', 'both prepare'\n    time.sleep(8)\n    return prepare(*args)\n"
        "process._prepare = slow"
    )
    run = [*flags, "--ddp_timeout", "5", "--cache_dir", str(tmp_path / "cache")]
    done = two_processes([*with_change(tmp_path, change), *run])
    assert done.returncode == 0, done.stderr[-2000:]


SETTLED = """
import json, sys
from utils.args import parse_args
from utils.runtime.errors import UserError
for argv in json.load(sys.stdin):
    try:
        print(json.dumps(["fine", parse_args(argv)[1].deepspeed]), flush=True)
    except UserError as error:
        print(json.dumps(["refused", *map(str, error.problems)]), flush=True)
"""


@pytest.fixture(scope="module")
def settle(tmp_path_factory):
    """Reads the arguments in a process of its own, which joins a group of one."""

    def run(*cases):
        folder = str(tmp_path_factory.mktemp("run") / "run")
        told = json.dumps([[*case, "--output_dir", folder, "--report_to", "none"] for case in cases])
        env = {**os.environ, "DS_ACCELERATOR": "cpu"}
        words = [sys.executable, "-c", SETTLED]
        done = subprocess.run(words, cwd=ROOT, env=env, input=told, capture_output=True, text=True, timeout=300)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]
        assert len(lines) == len(cases), done.stderr[-2000:]
        return lines

    return run


def test_short_names_files_and_none(settle, tmp_path):
    own = tmp_path / "own.json"
    shutil.copy(CONFIGS / "ds_config_zero1.json", own)
    names = [*NAMES, str(own), "none"]
    found = settle(*(["--deepspeed", name] for name in names), [])
    files = [str(CONFIGS / f"ds_config_{name}.json") for name in NAMES]
    assert [line[1] for line in found] == [*files, str(own), None, None]


def test_what_fights_with_a_flag_is_refused_with_both_values(settle, tmp_path, train, tiny_models):
    adapter = str(train("--max_steps", "1", output="adapter"))

    def file(**changes):
        path = tmp_path / f"{uuid.uuid4().hex}.json"
        config = json.loads((CONFIGS / "ds_config_zero2.json").read_text())
        path.write_text(json.dumps({**config, **changes}))
        return str(path)

    broken = tmp_path / "broken.json"
    broken.write_text("{")
    latin = tmp_path / "latin.json"
    latin.write_bytes(b'{"a": "\xe9"}')
    cases = [
        (["--deepspeed", file(train_micro_batch_size_per_gpu=3)], "per_gpu 3, and --per_device_train_batch_size is 16"),
        (["--deepspeed", file(gradient_clipping=0.5)], "gradient_clipping 0.5, and --max_grad_norm is 1.0"),
        (["--deepspeed", file(optimizer={"type": "Lion"})], "(Lion), which would replace --optim"),
        (
            ["--deepspeed", file(scheduler={"type": "OneCycle"})],
            "would replace --lr_scheduler_type cosine",
        ),
        (["--deepspeed", str(broken)], "is not JSON"),
        (["--deepspeed", str(latin)], "is not JSON"),
        (["--deepspeed", file(zero_optimization={"stage": 7})], "give an object with a stage of 0, 1, 2 or 3"),
        (["--deepspeed", file(zero_optimization=None)], 'has no zero_optimization; add it, {"stage": 0}'),
        (["--deepspeed", file(gradient_clipping=None)], "so --max_grad_norm 1.0 would do nothing"),
        (["--deepspeed", "zero22"], "is not a file. Did you mean 'zero2'"),
        (["--deepspeed", "zero2", "--on_nan", "skip"], "--on_nan skip"),
        (["--deepspeed", "zero3", "--init_lora_weights", "pissa"], "pissa"),
        (["--deepspeed", "zero3", "--train_special_tokens", "on"], "--train_special_tokens on"),
        (["--deepspeed", file(train_batch_size=7)], "train_batch_size 7, and the flags make it 16; write"),
        (
            ["--deepspeed", "zero3", "--train_mode", "full", "--adapter_name_or_path", adapter],
            "--train_mode full merges --adapter_name_or_path",
        ),
    ]
    for (_, said), line in zip(cases, settle(*(case for case, _ in cases)), strict=True):
        assert line[0] == "refused" and said in line[1], (said, line)


LOOKED_AT = """
import json, sys
from utils.args import parse_args
from utils.runtime.errors import UserError
try:
    args, train_args = parse_args(sys.argv[1:])
except UserError as error:
    print(json.dumps({"refused": [*map(str, error.problems)]}))
    sys.exit()
from transformers.integrations.deepspeed import deepspeed_config, is_deepspeed_zero3_enabled
from utils.model.meta import whole_models
with whole_models(train_args):
    inside = is_deepspeed_zero3_enabled()
plugin = train_args.deepspeed_plugin
print(json.dumps({"inside": inside, "after": is_deepspeed_zero3_enabled(), "config": plugin.hf_ds_config.config,
                  "loaded with": deepspeed_config()}))
"""
# what `accelerate launch` sets for a process under `zero_stage: 3`
ACCELERATE = {
    "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true", "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "false",
}  # fmt: skip


@pytest.mark.parametrize("launcher", ["accelerate", "a file", "false in a file"])
def test_zero3_gathers_its_weights_and_only_the_first_process_may_look_at_a_whole_model(launcher, tmp_path):
    """A model that one process builds to look at must not be split: the others would have to build it as well."""
    file = tmp_path / "zero3.json"
    config = json.loads((CONFIGS / "ds_config_zero3.json").read_text())
    del config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
    if launcher == "false in a file":
        config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = False
    file.write_text(json.dumps(config))
    given = [] if launcher == "accelerate" else ["--deepspeed", str(file)]
    found, said = looked_at(tmp_path, given, ACCELERATE if launcher == "accelerate" else {})
    assert found["config"]["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    assert "stage3_gather_16bit_weights_on_model_save is set to true" in said
    assert not found["inside"] and found["after"] and found["loaded with"] == found["config"]
    assert found["config"]["train_micro_batch_size_per_gpu"] == 16


def test_accelerates_deepspeed_that_fights_with_a_flag_is_refused(tmp_path):
    found, _ = looked_at(tmp_path, [], ACCELERATE | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"})
    (problem,) = found["refused"]
    assert "of accelerate has gradient_accumulation_steps 4, and --gradient_accumulation_steps is 1" in problem


def looked_at(tmp_path, given, environment):
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    env = {**os.environ, "DS_ACCELERATOR": "cpu", **(alone if environment else {}), **environment}
    words = [sys.executable, "-c", LOOKED_AT, *given, "--output_dir", str(tmp_path / "run"), "--report_to", "none"]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_what_a_flag_can_set_is_auto(name):
    config = json.loads((CONFIGS / f"ds_config_{name}.json").read_text(encoding="utf-8"))
    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ):
        assert config[key] == "auto"
    assert config["bf16"] == config["fp16"] == {"enabled": "auto"}
    assert not {"optimizer", "scheduler"} & set(config)
    assert str(config["zero_optimization"]["stage"]) == name[4]
    guide = (CONFIGS / "README.md").read_text(encoding="utf-8")
    used = (
        [*config, *config["zero_optimization"], "pin_memory"] if "offload" in name else [*config["zero_optimization"]]
    )
    assert all(f"{key}" in guide for key in used)


# ---------------------------------------------------------------------- the matrix
@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The one-process runs, each made once."""
    folder, made = tmp_path_factory.mktemp("alone"), {}

    def run(mode, task):
        if (mode, task) not in made:
            made[mode, task] = one_process(mode, task, folder / f"{mode}-{task}")
        return made[mode, task]

    return run


@pytest.mark.parametrize(("zero", "mode", "task"), COVERING)
def test_the_matrix_where_it_covers_every_two_values(zero, mode, task, alone, tmp_path):
    assert check(zero, mode, task, tmp_path / "run", alone(mode, task))["problems"] == []


def test_fsdp2_saves_resumes_and_is_loaded_by_plain_transformers(alone, tmp_path):
    run, once = tmp_path / "run", alone("full", "sft")
    flags = ["main_train.py", *FSDP_FLAGS, *flags_of("full", "sft", run, 2), "--save_strategy", "steps"]
    assert (done := two_processes([*flags, "--save_steps", "2"])).returncode == 0, done.stderr[-3000:]
    assert problems_of(run, once) == []
    shutil.rmtree(run / "checkpoint-3")
    (run / "model.safetensors").unlink()
    resumed = [*flags, "--save_steps", "2", "--resume_from_checkpoint", str(run / "checkpoint-2")]
    assert (done := two_processes([*resumed, "--overwrite_output_dir", "true"])).returncode == 0, done.stderr[-3000:]
    assert problems_of(run, once) == []


def test_the_pages_table_is_what_was_measured():
    results = json.loads((ROOT / "benchmarks" / "matrix.json").read_text(encoding="utf-8"))
    assert len(results["runs"]) == 56
    for name, corner in PAGES.items():
        assert table(results, corner) in (ROOT / name).read_text(encoding="utf-8")


# ---------------------------------------------------------------------- several machines
@pytest.fixture
def two_hosts():
    """Two network namespaces joined by a cable; yields each one's name, address and interface."""
    tag = uuid.uuid4().hex[:6]
    names = [f"dojo{tag}{side}" for side in "ab"]

    def ip(*words):
        return subprocess.run(["ip", *words], capture_output=True, text=True)

    try:
        made = [ip("netns", "add", name) for name in names] if shutil.which("ip") else []
        if not made or any(done.returncode for done in made):
            pytest.skip(
                f"network namespaces cannot be made here: {made[0].stderr.strip() if made else 'no ip command'}"
            )
        cable = [f"v{tag}{side}" for side in "ab"]
        steps = [ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1])]
        for number, (name, end) in enumerate(zip(names, cable, strict=True), 1):
            steps.append(ip("link", "set", end, "netns", name))
            for words in (["addr", "add", f"10.77.0.{number}/24", "dev", end], ["link", "set", end, "up"],
                          ["link", "set", "lo", "up"]):  # fmt: skip
                steps.append(ip("-n", name, *words))
        if any(done.returncode for done in steps):
            pytest.skip(f"no cable can be laid between namespaces here: {[d.stderr for d in steps if d.returncode][0]}")
        yield [(name, f"10.77.0.{number}", end) for number, (name, end) in enumerate(zip(names, cable, strict=True), 1)]
    finally:
        for name in names:
            ip("netns", "del", name)


@pytest.mark.usefixtures("real_processes")  # a fork would not be in the namespace
@pytest.mark.parametrize("command", ON_EACH_MACHINE, ids=["deepspeed", "torchrun"])
def test_two_hosts_train_together(two_hosts, command, flags, tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("".join(f"{address} slots=1\n" for _, address, _ in two_hosts))
    running = []
    for number, (name, _, interface) in enumerate(two_hosts):
        line = command.replace("--hostfile hosts", f"--hostfile {hosts}").replace(
            "--node_rank 0", f"--node_rank {number}"
        )
        words = shlex.split(line.replace("10.0.0.1", "10.77.0.1").replace("--nproc_per_node 8", "--nproc_per_node 1"))
        words[0] = str(Path(sys.executable).parent / words[0])
        env = {**os.environ, "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": interface, "OMP_NUM_THREADS": "1"}
        env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
        words = ["ip", "netns", "exec", name, *words, *flags]
        running.append(
            subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        said = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], said[0][-2000:] + said[1][-2000:]
    assert [text.count("finished: ") for text in said] == [1, 0]
    summary = json.loads((tmp_path / "run" / "train_args.json").read_text(encoding="utf-8"))
    assert summary["summary"]["steps"] == 2
    # four rows a step: two of each host
    assert steps_epochs(tmp_path / "run") == 2 * 4 / len(tiny.ROWS)


def steps_epochs(folder: Path) -> float:
    return json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["epoch"]


def test_the_first_start_says_that_it_compiles(tmp_path, monkeypatch):
    from loguru import logger

    from utils.runtime.distributed import _log_first_build

    said = []
    monkeypatch.setattr(logger, "info", lambda text, *values: said.append(text.format(*values)))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    _log_first_build()
    assert f"compiles its operators at its first start, for minutes; it keeps them in {tmp_path}" in said.pop()
    (tmp_path / "py311_cpu" / "op").mkdir(parents=True)
    (tmp_path / "py311_cpu" / "op" / "op.so").touch()
    _log_first_build()
    assert said == []


def test_the_lock_of_a_compiler_that_was_killed_is_removed_and_a_living_ones_is_not(tmp_path, monkeypatch):
    from utils.runtime.distributed import remove_stale_build_locks

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    dead, alive = (tmp_path / name / "lock" for name in ("dead", "alive"))
    for lock in (dead, alive):
        lock.parent.mkdir()
        lock.touch()
    with alive.open():
        remove_stale_build_locks()
        assert alive.exists() and not dead.exists()
    remove_stale_build_locks()
    assert not alive.exists()


def test_a_lock_that_is_made_anew_while_it_is_looked_at_stays(tmp_path, monkeypatch):
    """Torch closes a lock before it removes it, and the next process makes one of the same name."""
    from utils.runtime import distributed as launch

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "op" / "lock"
    lock.parent.mkdir()
    lock.touch()

    def another(seconds):
        lock.rename(lock.with_name("before"))
        lock.touch()

    monkeypatch.setattr(launch.time, "sleep", another)
    launch.remove_stale_build_locks()
    assert lock.exists()
