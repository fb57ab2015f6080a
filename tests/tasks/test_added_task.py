"""A task added as one file, one recipe and one row of the table passes every command; nothing else compares a name."""

import ast
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, write_rows

from utils.data.row_types import PAIR
from utils.tasks import MODULES, TASKS

TASK_FILE = '''
"""Labelled answers: one is made more likely or less likely, by its label. The step takes a list of prepared rows."""

from utils.data.bad_rows import BadRow, EmptyRow
from utils.data.conversations import read_text
from utils.data.encode import build_row_encoder
from utils.data.prepare import load_train_and_eval
from utils.data.report import Dropped
from utils.data.row_type import BOOL, IDS, LABELS, TEXTS, RowType, SequenceColumns, Texts
from utils.data.truncate import encode_within
from utils.tasks.no_effect import NoEffect
from utils.tasks.task import Task
from utils.tasks.trainer import make_trainer


def to_labelled_answer(row):
    answer = {name: read_text(row, name) for name in ("prompt", "completion")}
    if not isinstance(row.get("label"), bool):
        raise BadRow("has no true or false in 'label'")
    if not answer["completion"].strip():
        raise EmptyRow("has an empty completion")
    return {**answer, "label": row["label"], "tags": row.get("tags") or []}


LABELLED = RowType(
    "labelled answer",
    read=to_labelled_answer,
    texts=lambda row: Texts([row["prompt"]], [row["completion"]]),
    fields_read=lambda row: ("prompt", "completion", "label", "tags"),
    columns={"input_ids": IDS, "labels": LABELS, "label": BOOL, "tags": TEXTS},
    sequence_columns=(SequenceColumns("", ("input_ids",), "labels"),),
)


def load_datasets(args, train_args, template, tokenizer):
    def encode(rows):
        turns = [
            [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
            for row in rows
        ]
        encoded = encode_within(turns, template, tokenizer, args.max_len, args.overlong == "truncate")
        more = [{"label": row["label"], "tags": row["tags"]} for row in rows]
        return [one if isinstance(one, Dropped) else one | two for one, two in zip(encoded, more, strict=True)]

    encoder = build_row_encoder(
        args, train_args, tokenizer, LABELLED, to_labelled_answer, encode, task="labelled", template=template.key
    )
    return load_train_and_eval(args, train_args, encoder)


def loss_of(model, rows):
    """-log sigmoid(+- the mean log-probability of the labelled tokens), the mean over rows."""
    import torch
    from torch.nn.functional import cross_entropy, logsigmoid

    losses = []
    for row in rows:
        assert isinstance(row["label"], bool) and isinstance(row["tags"], list)
        logits = model(input_ids=torch.tensor([row["input_ids"]], device=model.device), use_cache=False).logits
        log_prob = -cross_entropy(logits[0, :-1].float(), torch.tensor(row["labels"][1:], device=model.device))
        losses.append(-logsigmoid(log_prob if row["label"] else -log_prob))
    return sum(losses) / len(losses)


def build_trainer(args, train_args, model, adapter, data, collator, tokenizer):
    import torch
    from transformers import Trainer

    from utils.train.filler import FillLastStepMixin
    from utils.train.trainer import FaultTolerantTrainerMixin

    class LabelledTrainer(FillLastStepMixin, FaultTolerantTrainerMixin, Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = loss_of(model, inputs)
            return (loss, {}) if return_outputs else loss

        def prediction_step(self, model, inputs, *args, **kwargs):
            with torch.no_grad():
                return loss_of(model, inputs).detach(), None, None

    return make_trainer(LabelledTrainer, args, train_args, model, adapter, data, collator, tokenizer)


TASK = Task(
    "labelled",
    LABELLED,
    load_datasets,
    build_trainer,
    settings_without_effect=(NoEffect(("train_on",), lambda s: True, "a row has one answer"),),
    plain_loss=lambda trainer, rows: loss_of(trainer.model, rows),
)
'''
RECIPE = """
from dataclasses import dataclass
from typing import ClassVar

from transformers import TrainingArguments


@dataclass
class TrainArgument(TrainingArguments):
    _argument_group_name = "recipe (train_args/labelled/base.py)"
    task_types: ClassVar[tuple[str, ...]] = ("labelled",)

    output_dir: str | None = None
    per_device_train_batch_size: int = 4
    per_device_eval_batch_size: int = 4
    learning_rate: float = 1e-3
    report_to: str = "none"
    logging_steps: float = 1
    seed: int = 42
"""
ROW = '    "sft": "utils.tasks.sft",\n'
QUESTIONS = (
    "What is the capital of France?",
    "How many legs has a cat?",
    "Name a colour.",
    "Say hello to Anna, please.",
)
ROWS = [
    {"prompt": question, "completion": answer, "label": answer[0] != "N", "tags": ["short", f"row {number}"], "id": 0}
    for number, question in enumerate(QUESTIONS)
    for answer in (f"It is number {number}, and that is all.", f"No idea {number}")
]  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project with the task added, and the function that runs one of its commands."""
    root = tmp_path_factory.mktemp("project")
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in ("utils", "train_args"):
        shutil.copytree(ROOT / folder, root / folder, ignore=ignore)
    shutil.copy(ROOT / "main_train.py", root)
    (root / "data").symlink_to(ROOT / "data")
    (root / "utils" / "tasks" / "labelled.py").write_text(TASK_FILE, encoding="utf-8")
    (root / "train_args" / "labelled").mkdir()
    (root / "train_args" / "labelled" / "base.py").write_text(RECIPE, encoding="utf-8")
    table = root / "utils" / "tasks" / "__init__.py"
    text = table.read_text(encoding="utf-8")
    assert text.count(ROW) == 1
    table.write_text(text.replace(ROW, f'{ROW}    "labelled": "utils.tasks.labelled",\n'), encoding="utf-8")
    rows = write_rows(root / "rows.jsonl", ROWS)
    flags = ["--train_args_path", "train_args/labelled/base.py", "--train_data_path", str(rows), "--precision", "fp32"]
    environment = {**os.environ, "PYTHONPATH": str(root), "HF_HOME": str(root / "hf"), "CUDA_VISIBLE_DEVICES": ""}

    def run(*command, code=0):
        done = subprocess.run(
            [sys.executable, *command, *flags], cwd=root, env=environment, capture_output=True, text=True, timeout=900
        )
        said = done.stdout + done.stderr
        assert done.returncode == code and "Traceback" not in said, said[-4000:]
        return done.stdout

    run.root = root
    return run


@pytest.mark.slow
@pytest.mark.usefixtures("fast_processes")
def test_main_train_trains_saves_and_resumes(project):
    out = project.root / "run"
    flags = ["--output_dir", str(out), "--val_size", "2", "--eval_strategy", "steps", "--eval_steps", "2"]
    flags += ["--save_steps", "2"]
    project("main_train.py", *flags, "--max_steps", "4")
    assert {"adapter_model.safetensors", "train_args.json", "trainer_state.json", "README.md"} <= set(os.listdir(out))
    history = json.loads((out / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [2, 4]
    again = ["--output_dir", str(project.root / "again"), *flags[2:], "--max_steps", "4"]
    project("main_train.py", *again, "--resume_from_checkpoint", str(out / "checkpoint-2"))
    resumed = json.loads((project.root / "again" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    losses = [{entry["step"]: entry["loss"] for entry in one if "loss" in entry} for one in (history, resumed)]
    assert losses[0] == losses[1] and sorted(losses[0]) == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.usefixtures("fast_processes")
def test_its_rows_stream(project):
    losses = []
    for streaming in ("true", "false"):
        out = project.root / f"streaming {streaming}"
        more = ["--train_sampling_strategy", "sequential", "--max_steps", "2", "--save_strategy", "no"]
        project("main_train.py", "--output_dir", str(out), "--streaming", streaming, *more)
        history = json.loads((out / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        losses.append([entry["loss"] for entry in history if "loss" in entry])
    assert losses[0] == losses[1] and len(losses[0]) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("fast_processes")
def test_the_doctor_swallows_no_error(project):
    report = json.loads(project("-m", "utils.script.doctor", "--json", "true"))
    assert "NOT_EXAMINED" not in [finding["code"] for finding in report["findings"]], report["findings"]


@pytest.mark.slow
@pytest.mark.usefixtures("fast_processes")
def test_explain_lists_what_the_task_lists(project):
    found = json.loads(project("-m", "utils.script.explain", "--json", "true"))
    assert found["task"] == "labelled" and found["idle"]["train_on"] == "a row has one answer"
    assert "max_prompt_length" in found["idle"] and found["plan"]["rows"] == len(ROWS)


@pytest.mark.slow
@pytest.mark.usefixtures("fast_processes")
def test_its_rows_are_prepared_alone(project):
    assert f"--train_data_path: {len(ROWS)} of {len(ROWS)} rows kept" in project("-m", "utils.script.prepare")


@pytest.mark.slow
@pytest.mark.usefixtures("fast_processes")
def test_show_data_shows_the_bool_and_the_texts(project):
    text = project("-m", "utils.script.show_data", "--rows", "2")
    assert "[[It is number 0, and that is all." in text and "label: True\ntags: ['short', 'row 0']" in text
    assert "label: False" in text and f"{len(ROWS)} of {len(ROWS)} rows are trained on" in text


@pytest.mark.slow
@pytest.mark.usefixtures("fast_processes")
def test_plan_memory_plans(project):
    assert "labelled" not in MODULES  # of this project, as opposed to the copy
    assert "GB" in project("-m", "utils.script.plan_memory")


@pytest.mark.slow
@pytest.mark.usefixtures("fast_processes")
def test_prove_proves(project):
    only = ["padded", "accumulation", "adapter_off", "resumed", "padding_free", "packed", "stops"]
    found = json.loads(project("-m", "utils.script.prove", "--json", "true", "--rows", "4", "--only", *only))
    holds = {proof["name"]: proof["holds"] for proof in found["proofs"]}
    assert [name for name in only if holds[name]] == ["padded", "accumulation", "adapter_off", "resumed"], found
    assert [name for name in only if holds[name] is None] == ["padding_free", "packed", "stops"], found


# ------------------------------------------------------------------ nothing else knows a task or a pair's columns
KNOWS_PAIRS = {"utils/data/row_types.py", "utils/data/truncate.py", "utils/data/collate.py", "utils/data/pairs.py"}
NAMES = {*TASKS, "dpo"}
COLUMNS = set(PAIR.columns)


@pytest.mark.parametrize(
    "path",
    [path for path in sorted((ROOT / "utils").rglob("*.py")) if path.parent.name != "tasks"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_only_tasks_know_the_name_of_a_task_and_only_row_types_its_columns(path):
    found = named_in(path.read_text(encoding="utf-8"))
    if str(path.relative_to(ROOT)) in KNOWS_PAIRS:
        found = [text for text in found if text not in COLUMNS]
    assert not found, f"{path.name} names {found}: ask the Task or its RowType"


def named_in(source: str) -> list[str]:
    """The names of tasks and the columns of pairs that a module's texts are, documentation left out."""
    return [
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in NAMES | COLUMNS
    ]


def test_a_comparison_would_be_found():
    assert named_in('x = args.task_type == "sft"') == ["sft"] and named_in('t.startswith("dpo")') == ["dpo"]
    assert named_in('row["chosen_ids"]') == ["chosen_ids"] and named_in('"""For sft and dpo_multi."""') == []


def test_looking_a_task_up_imports_no_heavy_library():
    heavy = ("transformers", "trl", "peft", "datasets", "bitsandbytes", "accelerate")
    code = (
        "import sys; from utils.tasks import TASKS\n"
        "for name in TASKS:\n"
        "    assert TASKS[name].name == name\n"
        f"    assert not set({heavy!r}) & sys.modules.keys(), name\n"
        "    assert 'torch' not in sys.modules or name == 'dpo_single', name  # its loss is written in torch\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
