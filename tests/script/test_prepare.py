"""prepare: the rows of a run are found by a later one, from any task, also when two prepare them at a time."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from conftest import write_rows

import main_train
from utils.data import prepare as preparing
from utils.script import prepare
from utils.storage.files import ROOT

BAD = [{"prompt": "Hi", "completion": ""}, {"messages": [{"role": "user", "content": "Hi"}]}]
PAIRS = [{"prompt": f"Question {i}", "chosen": "Yes.", "rejected": f"No {i}."} for i in range(8)]
TEXTS = [{"text": f"Text number {i}."} for i in range(8)]
TASKS = {
    "sft": ("sft", tiny.ROWS, ["--packing", "true"]),
    "pretrain": ("pretrain", TEXTS, ["--packing", "true"]),
    "dpo_multi": ("dpo", PAIRS, []),
    "dpo_single": ("dpo", PAIRS, ["--task_type", "dpo_single"]),
}


@pytest.fixture
def flags(tiny_models, tmp_path):
    """The flags of a run on a model without weights, and the folder of prepared rows."""
    folder = tmp_path / "no_weights"
    shutil.copytree(tiny_models(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    cache = tmp_path / "cache"

    def make(rows, *more, model=folder):
        data = write_rows(tmp_path / "rows.jsonl", rows)
        return ["--model_name_or_path", str(model), "--train_data_path", data, "--cache_dir", str(cache),
                "--output_dir", str(tmp_path / "run"), "--use_cpu", "true", *more]  # fmt: skip

    return make, cache


@pytest.fixture
def prepared(monkeypatch):
    """Counts how often rows are prepared rather than found."""
    calls = []
    original = preparing._prepare
    monkeypatch.setattr(preparing, "_prepare", lambda *given: (calls.append(1), original(*given))[1])
    return calls


@pytest.mark.parametrize("task", TASKS)
def test_rows_of_every_task_are_prepared_without_weights(task, flags, prepared, tmp_path, capsys):
    make, cache = flags
    recipe, rows, more = TASKS[task]
    given = make(rows, "--train_args_path", f"train_args/{recipe}/base.py", "--dataset_num_proc", "2", *more)
    prepare.main(given)
    out = capsys.readouterr().out
    assert f"--train_data_path: {len(rows)} of {len(rows)} rows kept, none dropped" in out
    (folder,) = map(Path, re.findall(r"in: (.*)", out))
    assert folder.parent == cache.resolve() and (folder / "report.json").is_file()
    assert not (tmp_path / "run").exists()
    prepare.main(given)
    assert capsys.readouterr().out == out and len(prepared) == 1


def test_rows_that_are_not_kept_are_counted_by_reason(flags, tmp_path, capsys):
    make, _ = flags
    validation = write_rows(tmp_path / "validation.jsonl", tiny.ROWS[:3])
    prepare.main(make([*tiny.ROWS, *BAD], "--on_bad_row", "drop", "--eval_data_path", validation))
    out = capsys.readouterr().out
    report = re.search(r"--train_data_path: (\d+) of (\d+) rows kept, (\d+) dropped \((.+)\)", out)
    assert [int(report[i]) for i in (1, 2, 3)] == [len(tiny.ROWS), len(tiny.ROWS) + 2, 2]
    assert "--eval_data_path: 3 of 3 rows kept" in out and len(set(re.findall(r"in: (.*)", out))) == 2


@pytest.mark.parametrize("more", [[], ["--template_date", "2026-01-31"], ["--template_name", "qwen"]])
def test_the_day_that_finds_the_rows_again_is_printed(
    flags, prepared, tiny_models, tmp_path, monkeypatch, capsys, more
):
    make, _ = flags
    model = shutil.copytree(tiny_models(), tmp_path / "dated")
    dated = "{{ 'Today is ' + strftime_now('%d %B %Y') + '. ' }}"
    chat = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    )
    prompt = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    (model / "chat_template.jinja").write_text(dated + chat + prompt)
    monkeypatch.setattr("utils.model.tokenizer.today", lambda: "2026-01-30")
    given = make(tiny.ROWS, "--template_name", "auto", *more, model=model)
    prepare.main(given)
    found = re.findall(r"pass (--template_date) (\S+)", capsys.readouterr().out)
    assert found == ([("--template_date", "2026-01-30")] if not more else [])
    monkeypatch.setattr("utils.model.tokenizer.today", lambda: "2026-01-31")
    prepare.main([*given, *(found[0] if found else [])])
    assert len(prepared) == 1


@pytest.mark.slow
def test_a_run_with_other_training_settings_starts_from_them(flags, prepared, tiny_models, capsys):
    make, _ = flags
    prepare.main(make(tiny.ROWS, "--val_size", "2"))
    assert "held back by --val_size: 2 rows" in capsys.readouterr().out
    more = ["--val_size", "2", "--max_steps", "1", "--learning_rate", "1e-3", "--seed", "7"]
    shutil.copytree(tiny_models(), (model := Path(make([])[1])), dirs_exist_ok=True)
    main_train.main(make(tiny.ROWS, *more, model=model))
    assert len(prepared) == 1


def test_an_interrupted_one_leaves_nothing_to_be_found(flags, prepared, monkeypatch):
    make, cache = flags

    def interrupt(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(preparing, "store", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare.main(make(tiny.ROWS))
    assert list(cache.iterdir()) == []
    prepare.main(make(tiny.ROWS))
    assert len(prepared) == 2 and len(list(cache.iterdir())) == 1


@pytest.mark.slow
def test_of_two_at_a_time_one_prepares(flags):
    make, cache = flags
    command = [sys.executable, "-m", "utils.script.prepare", *make(tiny.ROWS * 200)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT, "env": {**os.environ}}
    both = [subprocess.Popen(command, **options) for _ in range(2)]
    ended = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], ended
    assert ended[0][0] == ended[1][0]
    assert sum("prepared rows found in" in err + out for out, err in ended) == 1
    (folder,) = cache.iterdir()
    assert json.loads((folder / "report.json").read_text())["kept"] == len(tiny.ROWS) * 200


def test_bad_input_is_refused_at_once(flags, refused):
    make, cache = flags
    shown = refused(prepare.main, *make(tiny.ROWS, "--streaming", "true"))
    assert "--streaming" in shown
    shown = refused(prepare.main, *make(tiny.ROWS, "--max_lenn", "5", "--max_len", "0"))
    assert "--max_lenn" in shown and "--max_len 0" in shown
    assert "rows.jsonl:9" in refused(prepare.main, *make([*tiny.ROWS, BAD[1]]))
    assert not cache.exists() or list(cache.iterdir()) == []


def test_help_names_the_flags_it_takes(capsys):
    with pytest.raises(SystemExit) as end:
        prepare.main(["--help"])
    assert end.value.code == 0 and "main_train.py" in capsys.readouterr().out


def test_a_mixture_is_prepared_source_by_source(tmp_path, tiny_models, capsys):
    for name in ("a", "b"):
        write_rows(tmp_path / f"{name}.jsonl", [{"instruction": f"{name} {i}", "output": "yes"} for i in range(4)])
    paths = f"{tmp_path / 'a.jsonl'}:1,{tmp_path / 'b.jsonl'}:2"
    prepare.main(
        ["--model_name_or_path", tiny_models(), "--train_data_path", paths, "--cache_dir", str(tmp_path / "c")]
    )
    out = capsys.readouterr().out
    assert "8 of 8 rows kept" in out
    assert sorted(re.findall(r"in: (.*)", out)) == sorted(str(path) for path in (tmp_path / "c").iterdir())
