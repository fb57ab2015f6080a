"""What prepared rows are found again by: everything they depend on, and nothing else."""

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
from conftest import ROOT, write_rows

from utils.args import parse_args
from utils.data import cache as data_keys
from utils.data import prepare as data_process
from utils.data.cache import locked, rows_key, tokenizer_key
from utils.model.tokenizer import load_run_tokenizer
from utils.runtime.errors import UserError
from utils.tasks import get_task
from utils.template import get_template

CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
DATED = "{{ 'Today is ' + strftime_now('%d %B %Y') + '. ' }}" + CHAT
TASKS = {
    "sft": ("sft", tiny.ROWS),
    "pretrain": ("pretrain", [{"text": row["output"]} for row in tiny.ROWS]),
    "dpo_multi": ("dpo", tiny.PAIRS),
    "dpo_single": ("dpo", tiny.PAIRS),
}
PREPARE = """
import json, sys
from utils.args import parse_args
from utils.train.resume import run_settings
from utils.tasks import get_task
from utils.template import get_template
from utils.model.tokenizer import load_run_tokenizer
for argv in json.loads(sys.argv[1]):
    args, train_args = parse_args(argv)
    tokenizer, task = load_run_tokenizer(args), get_task(args.task_type)
    template = get_template(args.template_name, tokenizer, args.template_date) if task.uses_template else None
    data = task.load_datasets(args, train_args, template, tokenizer)
    print(json.dumps([data.report.files, run_settings(args, train_args, data)["must"]]))
"""


@pytest.fixture
def base(tmp_path):
    """Makes a tiny base with a chat template, and many special tokens of one length."""

    def make(template):
        tokenizer = tiny.byte_level_tokenizer().__class__(
            tokenizer_object=tiny.byte_level_tokenizer().backend_tokenizer,
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            additional_special_tokens=[f"<|tool_{letter}|>" for letter in "abcdefgh"],
        )
        tokenizer.chat_template = template
        return tiny.save_tiny_model(tmp_path / "base", tokenizer=tokenizer)

    return make


@pytest.fixture
def prepare(base, tmp_path):
    """Prepares rows as main_train.py does with `--template_name auto`; returns the task's Data."""

    def run(*flags, template=CHAT, task="sft", rows=tiny.ROWS):
        args, train_args = parse_args(
            ["--train_args_path", f"train_args/{task}/base.py", "--model_name_or_path", base(template),
             "--train_data_path", write_rows(tmp_path / "rows.jsonl", rows), "--output_dir", str(tmp_path / "run"),
             "--cache_dir", str(tmp_path / "cache"), "--template_name", "auto", *flags]
        )  # fmt: skip
        tokenizer = load_run_tokenizer(args)
        template = get_template("auto", tokenizer, args.template_date)
        return get_task(args.task_type).load_datasets(args, train_args, template, tokenizer)

    return run


def folders(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").iterdir())


def test_every_task_finds_its_rows_again_under_another_hash_seed(base, tmp_path, monkeypatch, capsys):
    argvs, model = [], base(CHAT)
    for name, (recipe, rows) in TASKS.items():
        file = write_rows(tmp_path / f"{name}.jsonl", rows)
        argvs.append(
            ["--train_args_path", f"train_args/{recipe}/base.py", "--task_type", name, "--model_name_or_path", model,
             "--train_data_path", file, "--template_name", "auto" if name != "pretrain" else "qwen",
             "--cache_dir", str(tmp_path / "cache"), "--output_dir", str(tmp_path / "run")]
        )  # fmt: skip
    other_seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    done = subprocess.run(
        [sys.executable, "-c", PREPARE, json.dumps(argvs)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONHASHSEED": other_seed},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    said, found = [done.stdout], [folders(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["-c", json.dumps(argvs)])
    capsys.readouterr()
    exec(PREPARE, {})  # in this process, whose hash seed is another
    said.append(capsys.readouterr().out)
    found.append(folders(tmp_path))
    # both tasks of pairs prepare the same rows, once
    assert said[0] == said[1] and found[0] == found[1] and len(found[0]) == len(TASKS) - 1


def test_special_tokens_are_part_of_the_key(tokenizer):
    more = tiny.byte_level_tokenizer().__class__(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    assert tokenizer_key(more) != tokenizer_key(tokenizer)


def test_the_last_call_of_a_tokenizer_is_no_part_of_the_key(base):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base(CHAT))
    before = tokenizer_key(tokenizer)
    tokenizer(["Hi", "Hello, quick brown fox"], padding=True, truncation=True, max_length=3)
    assert tokenizer_key(tokenizer) == before


@pytest.mark.parametrize("library, flags", [("tokenizers", []), ("jinja2", []), ("trl", ["--packing", "true"])])
def test_another_library_prepares_anew_and_the_same_rows_stay_the_same(prepare, tmp_path, monkeypatch, library, flags):
    first, version = prepare(*flags).report.key, importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9" if name == library else version(name))
    assert prepare(*flags).report.key == first and len(folders(tmp_path)) == 2


def test_what_the_rows_do_not_depend_on_is_no_part_of_the_key(prepare, tmp_path):
    more = ["--seed", "7", "--learning_rate", "1", "--dataset_num_proc", "1", "--per_device_train_batch_size", "1"]
    assert prepare().report.key == prepare(*more).report.key and len(folders(tmp_path)) == 1


@pytest.mark.parametrize("moved", ["elsewhere/renamed.jsonl", "rows.json"])
def test_a_file_that_was_moved_is_found_again_and_named_as_it_is_now(prepare, tmp_path, monkeypatch, moved):
    rows = [*tiny.ROWS, {"instruction": "Hi", "output": ""}, {"instruction": "a", "output": "b", "note": 1}]
    first = prepare(rows=rows).report
    monkeypatch.chdir(tmp_path)
    assert prepare("--train_data_path", "rows.jsonl", rows=rows).report.files == ["rows.jsonl"]
    assert len(folders(tmp_path)) == 1
    file = tmp_path / moved
    file.parent.mkdir(exist_ok=True)
    (tmp_path / "rows.jsonl").rename(file)
    report = prepare("--train_data_path", str(file), rows=rows).report
    assert len(folders(tmp_path)) == (1 if moved.endswith(".jsonl") else 2)  # another suffix may be read otherwise
    assert report.key == first.key and report.files == [str(file)]
    assert {record.file for record in report.records} == {file for file, *_ in report.totals} == {str(file)}
    assert report.unread == {str(file): {"note": 1}} and report.dropped == first.dropped


def test_other_ids_in_the_same_order_have_another_key(prepare):
    keys = {prepare(rows=rows).report.key for rows in (tiny.ROWS, tiny.ROWS[::-1], tiny.ROWS[1:])}
    assert len(keys | {prepare("--train_on", "last_turn").report.key}) == 4


def test_rows_that_are_cut_at_other_places_have_another_key():
    """The same ids in the same order, divided otherwise into rows."""
    from datasets import Dataset

    rows = [[[1, 2], [3]], [[1], [2, 3]], [[1, 2, 3], []]]
    keys = {rows_key(Dataset.from_dict({"input_ids": ids, "labels": ids, "source": [[1], [2]]})) for ids in rows}
    assert len(keys) == 3


# ---------------------------------------------------------------------- the day that a template prints
def test_the_day_is_part_of_the_key_and_of_the_rows(prepare, tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr("utils.model.tokenizer.today", lambda: "2026-01-31")
    first = prepare(template=DATED)
    assert "Today is 31 January 2026. <|im_start|>user" in tokenizer.decode(first.train[0]["input_ids"])
    monkeypatch.setattr("utils.model.tokenizer.today", lambda: "2026-02-01")
    second = prepare(template=DATED)
    assert "Today is 01 February 2026" in tokenizer.decode(second.train[0]["input_ids"])
    assert second.report.key != first.report.key and len(folders(tmp_path)) == 2
    again = prepare("--template_date", "2026-01-31", template=DATED)
    assert again.report.key == first.report.key and len(folders(tmp_path)) == 2


def test_a_template_without_a_day_is_the_same_tomorrow(prepare, tmp_path, monkeypatch):
    for day in ("2026-01-31", "2026-02-01"):
        monkeypatch.setattr("utils.model.tokenizer.today", lambda day=day: day)
        prepare()
    assert len(folders(tmp_path)) == 1


def test_a_day_that_is_none_is_refused(refused, base, rows_file):
    import main_train

    flags = ["--model_name_or_path", base(DATED), "--train_data_path", rows_file, "--template_name", "auto"]
    out = refused(main_train.main, *flags, "--template_date", "31.1.2026")
    assert "--template_date '31.1.2026' is not allowed; give a day as 2026-01-31" in out


def test_a_resumed_run_keeps_its_day(train, base, monkeypatch):
    flags = ["--template_name", "auto", "--save_strategy", "steps", "--save_steps", "1", "--max_steps", "2"]
    monkeypatch.setattr("utils.model.tokenizer.today", lambda: "2026-01-31")
    folder = train(*flags, model=base(DATED))
    record = json.loads((folder / "train_args.json").read_text())
    assert record["common"]["template_date"] == "2026-01-31"
    monkeypatch.setattr("utils.model.tokenizer.today", lambda: "2026-02-01")
    checkpoint = str(folder / "checkpoint-1")
    later = train(*flags, "--resume_from_checkpoint", checkpoint, model=base(DATED), output="later")
    assert json.loads((later / "train_args.json").read_text())["common"]["template_date"] == "2026-01-31"
    assert json.loads((later / "trainer_state.json").read_text())["global_step"] == 2


# ---------------------------------------------------------------------- files that change
@pytest.mark.parametrize("kind", ["appended", "replaced", "removed"])
def test_a_file_that_changes_while_it_is_read_is_refused(prepare, tmp_path, monkeypatch, kind):
    parts, file = data_process.encode_files, tmp_path / "rows.jsonl"

    def change_then_read(*args):
        if kind == "appended":
            with file.open("a", encoding="utf-8") as opened:
                opened.write(json.dumps({"instruction": "More?", "output": "Yes."}) + "\n")
        elif kind == "replaced":  # of the same length
            file.write_bytes(file.read_bytes().replace(b"Paris.", b"Lyons."))
        yield from parts(*args)
        if kind == "removed":
            file.unlink()

    monkeypatch.setattr(data_process, "encode_files", change_then_read)
    with pytest.raises(UserError, match="was changed while it was read; start again"):
        prepare()
    assert folders(tmp_path) == []


def test_the_record_has_the_size_that_was_hashed(prepare, tmp_path):
    report = prepare().report
    file = tmp_path / "rows.jsonl"
    assert (report.hashes, report.bytes_of) == (
        {str(file): data_keys.checksum(str(file))[0]}, {str(file): file.stat().st_size}
    )  # fmt: skip


def test_without_a_day_a_template_prints_what_transformers_prints(base):
    """The contract of the patch: a stopped clock changes what `strftime_now` prints, and nothing once it is over."""
    from datetime import datetime

    from transformers import AutoTokenizer

    tokenizer, rows = AutoTokenizer.from_pretrained(base(DATED)), [{"role": "user", "content": "Hi"}]
    stopped = get_template("auto", tokenizer, "2001-09-08").render(rows)
    official = tokenizer.apply_chat_template(rows, tokenize=False)
    assert stopped.startswith("Today is 08 September 2001. ")
    assert stopped.replace("08 September 2001", datetime.now().strftime("%d %B %Y")) == official


def test_processes_that_read_different_rows_are_refused(prepare, monkeypatch):
    monkeypatch.setattr(data_process, "all_gather_objects", lambda keys: [*keys, "another"])
    with pytest.raises(UserError, match="--train_data_path: the processes have read different rows; give each machine"):
        prepare()


def test_the_lock_of_a_preparation_is_removed_and_lets_one_in_at_a_time(tmp_path, monkeypatch):
    """Whoever waits for a lock that is removed must not hold the old file beside one who holds a new one."""
    (tmp_path / "locks").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "locks"))
    inside, most = [], []

    def enter(number):
        for _ in range(8):
            with locked(tmp_path / "cache" / "rows"):
                inside.append(number)
                time.sleep(0.002)
                most.append(len(inside))
                inside.remove(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(enter, range(4)))
    assert len(most) == 32 and max(most) == 1
    assert not list((tmp_path / "locks").iterdir())
