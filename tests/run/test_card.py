"""The run card: what it says of a run, and that texts in it stay texts."""

import hashlib
import json
import math
import re
import types
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tiny
import torch
from cards import ANSWERS, DPO, FP32, card_of
from conftest import ROOT, write_rows
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

import main_train
import utils.run.samples
import utils.run.save
from utils.args import parse_args
from utils.run.card import _front_matter, _result, card_text, changed_settings, is_own_card, write_card
from utils.run.samples import Sample
from utils.runtime.text import code_block, escape_markdown, inline_code, settings_table


def rows_of(card: str) -> dict[str, str]:
    """The two-column tables of a card."""
    cells = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ")]
    return {row[0]: row[1] for row in cells if len(row) == 2}


def test_the_card_of_a_run(train, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    rows = write_rows(tmp_path / "some rows.jsonl", [*tiny.ROWS, {"instruction": "Nothing?", "output": ""}])
    folder = train(*FP32, *ANSWERS, "--val_size", "2", "--lora_rank", "4", "--hub_token", "hf_given", data=rows)
    card, record = card_of(folder), json.loads((folder / "train_args.json").read_text())
    data = ModelCard(card).data
    assert (data.library_name, data.tags) == ("peft", ["llm-dojo", "trl", "sft", "lora"]) and data.base_model is None
    told, summary = rows_of(card), record["summary"]
    assert told["training loss"] == f"{summary['first_loss']:.4f} at first, {summary['last_loss']:.4f} at last"
    assert f"{summary['eval_loss']:.4f} at last" in told["evaluation loss"]
    assert told["steps"] == "4" and told["chat template"] == "`qwen`" and told["precision"] == "fp32"
    assert record["base"]["fingerprint"] in told["base"] and record["base"]["path"] in told["base"]
    assert "| training | 9 | 8 | 1 with nothing to train |" in card
    assert "| evaluation | – | 2, held back of the training rows |" in card
    sha = hashlib.sha256((tmp_path / "some rows.jsonl").read_bytes()).hexdigest()
    assert f"| `{rows}` | {(tmp_path / 'some rows.jsonl').stat().st_size:,} | `{sha}` |" in card
    assert told["lora_rank"] == "4 (default: 16)" and "lora_rank 4, lora_alpha 32" in told["adapter"]
    assert "lora_target_modules every linear layer but the head" in told["adapter"]
    assert f"torch {torch.__version__}" in told["libraries"] and "cores" in told["processor"]
    assert told["GPUs"] == "none" and told["processes"] == "1" and "tokens seen" in told and "training time" in told
    assert f"python main_train.py --config {folder}/train_args.json" in card
    assert "hf_" not in card + json.dumps(record)
    assert record["data"]["train"]["files"][0]["sha256"] == sha


def test_only_a_base_on_the_hub_is_named_in_the_metadata(tiny_models):
    common = {"model_name_or_path": "Qwen/Qwen1.5-7B", "train_mode": "full", "task_type": "dpo_multi"}
    data = ModelCard(_front_matter(common) + "\n").data
    assert (data.base_model, data.library_name, data.tags[2]) == ("Qwen/Qwen1.5-7B", "transformers", "dpo")
    assert ModelCard(_front_matter({**common, "model_name_or_path": "data/tiny_model"}) + "\n").data.base_model is None
    assert ModelCard(_front_matter({**common, "model_name_or_path": tiny_models()}) + "\n").data.base_model is None


@pytest.mark.parametrize("recipe", sorted(str(p.relative_to(ROOT)) for p in (ROOT / "train_args").glob("*/*.py")))
def test_a_run_with_defaults_has_no_changed_settings(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args, train_args = parse_args(["--train_args_path", recipe])
    # the sample texts hold chats, written out
    own = {"allow_special_tokens_in_content": (False, True)} if "pretrain" in recipe else {}
    assert changed_settings(args, train_args) == own
    flags = ["--learning_rate", "7e-5", "--use_dora", "true", "--max_len", "77", "--hub_token", "hf_secret"]
    changed = changed_settings(*parse_args(["--train_args_path", recipe, *flags]))
    assert set(changed) == {"learning_rate", "use_dora", "max_len", *own} and changed["max_len"] == (1024, 77)


def test_a_card_has_the_first_the_last_and_the_best_loss():
    summary = {"first_loss": 4.0, "last_loss": 1.5, "steps": 1200, "steps_skipped": 2, "eval_accuracy": 0.625}
    values = {2: 3.0, 4: math.nan, 1100: 2.0, 1200: 2.5}
    history = [{"step": step, "eval_loss": value} for step, value in values.items()]
    assert [tuple(map(str, row)) for row in _result({"summary": summary}, history)] == [
        ("training loss", "4.0000 at first, 1.5000 at last"),
        ("evaluation loss", "3.0000 at first, 2.5000 at last, 2.0000 at best (step 1,100)"),
        ("evaluation pairs", "62.5 % with the higher reward for chosen"),
        ("steps", "1,200, 2 left out (not finite)"),
    ]


def test_a_card_has_the_losses_of_each_source_and_the_counts_of_the_ledger(train, tmp_path):
    files = [
        write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in (("a", tiny.ROWS[:4]), ("b", tiny.ROWS[4:]))
    ]
    flags = ["--eval_data_path", ",".join(files), "--logging_steps", "1", "--row_ledger", "true"]
    folder = train(*FP32, *flags, data=",".join(files))
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    card = card_of(folder)
    for name in "ab":
        training, held = (
            [entry[key] for entry in history if key in entry] for key in (f"loss/{name}", f"eval_loss/{name}")
        )
        cells = [f"{values[0]:.4f} at first, {values[-1]:.4f} at last" for values in (training, held)]
        assert f"| `{name}` | {cells[0]} | {cells[1]} |" in card
    summary = json.loads((folder / "train_args.json").read_text(encoding="utf-8"))["summary"]
    counts = summary["row_ledger"]
    assert counts["rows"] == 8 == sum(counts[name] for name in ("learned", "forgotten", "never_learned"))
    assert rows_of(card)["rows, by their losses"].startswith(f"{counts['learned']} of 8 rows learned, ")


def test_texts_cannot_break_the_card(train):
    folder = train("--max_steps", "1")
    record = json.loads((folder / "train_args.json").read_text())
    assert "none were generated" in card_of(folder)
    sample = Sample([1], "````\n# not a title", "a", "```", "b")
    card = card_text(record, [], {"name": ("a|b", None)}, [sample], "", "run")
    assert "`````text\n````\n# not a title\n`````" in card and "````text\n```\n````" in card
    assert code_block("a\x00\x1b[1m\n\tb") == "```text\na\ufffd\ufffd[1m\n\tb\n```"
    assert "| x | a&#124;b |" in settings_table([("x", "a|b")])


HOSTILE = [
    "<img src=x onerror=alert(1)>", "a `b` c", "`<script>alert(1)</script>`", "[click](javascript:alert(1))", "a|b|c",
    "![x](https://evil.example/x.png)", "two\nlines\n\n# title", "back\\slash\\|pipe", "*bold* _it_ ~~gone~~",
    "&lt;b&gt;",
    "https://evil.example www.evil.example <https://evil.example> a@evil.example", "`", "``", "\\`", "--> <!-- x",
    "[a]: https://evil.example", "plain/path_with_underscores-1.0.jsonl", " ",
]  # fmt: skip


class Page(HTMLParser):
    """A page as a browser reads it: its tags with their attributes, and its text."""

    def __init__(self, markdown: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, *attrs))

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_are_shown_literally(text):
    """Read by another program: Markdown to HTML, HTML to text."""
    shown = " ".join(text.split())
    for form, tag in ((escape_markdown, []), (inline_code, [("code",)])):
        for markdown, around in (
            (f"x {form(text)} y", ["p"]),
            (f"# x {form(text)} y", ["h1"]),
            (
                f"| a | b |\n|---|---|\n| x | {form(text)} y |",
                ["table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td"],
            ),
        ):
            page = Page(markdown)
            assert page.tags == [(name,) for name in around] + tag
            assert "".join(page.text.split()).removeprefix("ab") == "".join(f"x {shown} y".split())
    # what GitHub makes links of without being asked to: https://github.github.com/gfm/#autolinks-extension-
    assert not re.search(r"https?://|www\.|@", escape_markdown(text))


def test_names_from_outside_are_escaped(train):
    """Every text of the record is one that a user, a hub or the rows could have chosen."""
    folder = train("--max_steps", "1")
    record = json.loads((folder / "train_args.json").read_text())
    bad = "<img src=x onerror=alert(1)>`|[a](b)\n# x\n```\n<b>"

    def spoil(value):
        if isinstance(value, dict):
            return {name: spoil(one) if name not in ("train_mode", "task_type") else one for name, one in value.items()}
        return [spoil(one) for one in value] if isinstance(value, list) else bad if isinstance(value, str) else value

    spoilt = spoil(record) | {"resumed": [{"from": bad, "changed": {bad: [bad, bad]}}]}
    spoilt["data"]["train"] |= {"dropped": {bad: 1}}
    spoilt["summary"] |= {"best_kept": True, "best_step": 1, "best_figure": bad}
    card = card_text(spoilt, [], {"run_name": (bad, bad)}, [Sample([1], bad, bad, bad, bad)], bad, bad)
    page = Page(card.split("---\n", 2)[2])
    assert {tag[0] for tag in page.tags} <= {"h1", "h2", "h3", "p", "img", "code", "pre", "table", "thead", "tbody",
                                            "tr", "th", "td"}  # fmt: skip
    assert [tag[1:] for tag in page.tags if tag[0] == "img"] == [(("src", "loss.png"), ("alt", "loss"))]
    assert [tag for tag in page.tags if tag[0] == "h1"] == [("h1",)]
    assert page.text.count("onerror=alert(1)") > 30
    assert ModelCard(card).data.library_name == "peft"


def test_a_users_readme_is_kept(train, refused, tmp_path, tiny_models, rows_file):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "README.md").write_text("precious")
    flags = ["--model_name_or_path", tiny_models(), "--train_data_path", rows_file, "--output_dir", str(folder)]
    assert "already holds 'README.md'" in refused(main_train.main, *flags)
    train("--overwrite_output_dir", "true", "--max_steps", "1")
    assert (folder / "README.md").read_text() == "precious"
    assert is_own_card(folder / "run_card.md")


def test_a_card_of_an_earlier_run_is_replaced(tmp_path, train):
    folder = train("--max_steps", "1")
    before = card_of(folder)
    train("--max_steps", "2", "--overwrite_output_dir", "true")
    assert card_of(folder) != before and "| steps | 2 |" in card_of(folder)
    assert not (folder / "run_card.md").exists()
    assert write_card(folder, "mine") == folder / "README.md"


def test_a_failed_card_does_not_end_the_run(train, monkeypatch):
    def fail(*args):
        raise KeyError("told")

    monkeypatch.setattr(utils.run.save, "card_text", fail)
    folder = train("--max_steps", "1")
    assert (folder / "train_args.json").exists() and not (folder / "README.md").exists()
    assert "the run's card cannot be written" in (folder / "train.log").read_text()


@pytest.fixture
def hub(monkeypatch):
    """A hub that takes every upload; yields what each held: name → bytes."""
    import fnmatch

    import huggingface_hub

    uploads = []

    def upload(*_, folder_path, ignore_patterns=(), **options):
        files = {str(path.relative_to(folder_path)): path for path in Path(folder_path).rglob("*") if path.is_file()}
        left_out = [ignore_patterns] if isinstance(ignore_patterns, str) else ignore_patterns
        kept = [name for name in files if not any(fnmatch.fnmatch(name, f"{p}*" if p == "_*" else p) for p in left_out)]
        uploads.append({name: files[name].read_bytes() for name in kept})

    repo = types.SimpleNamespace(repo_id="me/run")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, **__: repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload)
    return uploads


def test_the_finished_run_is_pushed_without_any_token(train, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    flags = [
        "--push_to_hub",
        "true",
        "--hub_token",
        "hf_SECRET",
        "--init_lora_weights",
        "pissa",
        "--hub_strategy",
        "end",
    ]
    folder = train(*FP32, *flags, *ANSWERS, "--save_strategy", "steps", "--save_steps", "2")
    pushed = hub[-1]
    wanted = {"README.md", "adapter_model.safetensors", "generation_config.json", "train_args.json", "loss.png"}
    assert wanted <= pushed.keys()
    assert pushed["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()
    assert not [name for name in pushed if "pissa" in name or "checkpoint" in name or name.endswith(".part")]
    everything = [content for files in hub for content in files.values()]
    everything += [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert not any(b"hf_SECRET" in content for content in everything)


def test_an_unreachable_hub_is_reported_before_training(refused, monkeypatch, tmp_path, tiny_models, rows_file):
    ConnectError = type("ConnectError", (Exception,), {"__module__": "httpx2"})

    def gone(*_, **__):
        raise ConnectError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", gone)
    run = ["--model_name_or_path", tiny_models(), "--train_data_path", rows_file, "--output_dir", str(tmp_path / "run")]
    said = refused(main_train.main, *run, "--push_to_hub", "true", "--report_to", "none")
    assert "--push_to_hub true: the hub cannot be used (ConnectError: no route)" in said


def test_pefts_model_card_does_not_replace_a_users_readme(train, tmp_path, monkeypatch):
    """Not even for a moment: saving may fail right after it."""
    from utils.train.trainer import FaultTolerantTrainerMixin

    folder, seen = tmp_path / "run", []
    folder.mkdir()
    (folder / "README.md").write_text("mine")
    (folder / "run_card.md").write_text("mine too")

    def watched(self, *args, **kwargs):
        super(FaultTolerantTrainerMixin, self).save_model(*args, **kwargs)
        seen.append((folder / "README.md").read_text())

    monkeypatch.setattr(FaultTolerantTrainerMixin, "save_model", watched, raising=False)
    train("--overwrite_output_dir", "true")
    assert seen and set(seen) == {"mine"}
    assert [(folder / name).read_text() for name in ("README.md", "run_card.md")] == ["mine", "mine too"]


def test_a_resume_with_changed_settings_is_named_in_the_card(train):
    more = ["--save_strategy", "steps", "--save_steps", "1", "--max_steps", "2"]
    train(*more)
    folder = train(*more[:-1], "3", "--resume_from_checkpoint", "true", "--learning_rate", "7e-5")
    card, record = card_of(folder), json.loads((folder / "train_args.json").read_text())
    before, now = record["resumed"][0]["changed"]["learning_rate"]
    assert (float(before), float(now)) == (2e-3, 7e-5)
    assert f"learning_rate {now} (it was {before})" in card
    assert "Resumed from `" in card and "one command does not repeat it" in card


def test_a_changed_start_adapter_is_recorded_and_warned_of(train, tmp_path):
    from loguru import logger

    start = train("--max_steps", "1", output="start")
    pairs = write_rows(tmp_path / "pairs.jsonl", tiny.PAIRS)
    folder = train(*DPO, "--adapter_name_or_path", str(start), "--max_steps", "1", data=pairs, output="dpo")
    record = json.loads((folder / "train_args.json").read_text())
    assert record["adapter"]["fingerprint"] in card_of(folder)
    record["adapter"]["fingerprint"] = "abc"
    (folder / "train_args.json").write_text(json.dumps(record))
    said = []
    number = logger.add(lambda line: said.append(str(line)), level="WARNING", format="{message}")
    parse_args(["--config", str(folder)])
    logger.remove(number)
    assert "the adapter" in "".join(said) and "had the weights abc" in "".join(said)


def test_secrets_of_a_recipe_are_not_recorded(tmp_path, train):
    recipe = tmp_path / "own.py"
    text = (ROOT / "train_args/sft/base.py").read_text(encoding="utf-8")
    recipe.write_text(text + '    wandb_api_key: str = "sk-SECRET"\n    my_password: str = "sk-SECRET"\n')
    folder = train("--train_args_path", str(recipe), "--max_steps", "1")
    assert not any(b"sk-SECRET" in path.read_bytes() for path in folder.rglob("*") if path.is_file())
