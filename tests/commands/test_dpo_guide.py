"""train_args/dpo/README.md: every command in it is run, its code does what it says, its figures are measured."""

import json
import re
import shlex

import pytest
import tiny
import torch
from conftest import ROOT, write_rows

import main_train
from benchmarks.dpo import GUIDE, measure, table
from utils.script import infer, show_data

TEXT = GUIDE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
CODE = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = {"utils.script.infer": infer.main, "utils.script.show_data": show_data.main}


@pytest.fixture
def run_block(monkeypatch, tmp_path, capsys):
    """Runs a block's commands in an empty folder, one after the other; returns what they printed."""

    def run(block, *shortened):
        monkeypatch.chdir(tmp_path)
        write_rows(tmp_path / "my_pairs.jsonl", tiny.PAIRS)
        capsys.readouterr()
        for line in block.strip().splitlines():
            words = shlex.split(line)
            assert words[0] == "python"
            if words[1] == "main_train.py":
                main_train.main([*words[2:], *shortened, "--report_to", "none", "--disable_tqdm", "true"])
            else:
                COMMANDS[words[2]](words[3:])
        return capsys.readouterr().out

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("block", "mode"), [(BLOCKS[0], "dpo_multi"), (BLOCKS[1], "dpo_single")])
def test_the_default_recipe_learns_the_preference(run_block, tmp_path, block, mode):
    run_block(block)
    (folder,) = (tmp_path / "output").iterdir()
    before, after = measure(folder, ROOT / "data" / f"{mode}_eval_data.jsonl")
    assert 0.4 <= before <= 0.6
    assert after >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS[2:], ids=lambda block: block.splitlines()[0][-40:])
def test_every_other_command_runs(run_block, block, tmp_path):
    said = run_block(block, "--max_steps", "3", "--save_strategy", "no", "--eval_strategy", "no")
    if "infer" in block:
        assert said.strip()
    if "--adapter_name_or_path" in block:
        settings = json.loads((tmp_path / "output/dpo/train_args.json").read_text(encoding="utf-8"))["common"]
        assert settings["adapter_name_or_path"].endswith("output/sft")
        steps = json.loads((tmp_path / "output/dpo/trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        assert steps[0]["rewards/margins"] == 0


def test_every_command_of_the_guide_stands_in_a_block():
    assert len(BLOCKS) == 6 and TEXT.count("python main_train.py") == sum(b.count("main_train.py") for b in BLOCKS)


NUMBERS = [torch.tensor(values) for values in ([-3.0, -1.0], [-2.0, -9.0], [-3.5, -1.0], [-2.5, -8.0])]


def test_the_guides_ipo_is_that_of_the_paper():
    names: dict = {}
    exec(CODE[0], names)
    losses, chosen, rejected = names["preference_loss"](*NUMBERS, beta=0.5)
    assert losses.tolist() == [(0.5 - 0.5 - 1) ** 2, (0.0 + 1.0 - 1) ** 2]
    assert chosen.tolist() == [0.25, 0.0] and rejected.tolist() == [0.25, -0.5]


def test_the_guides_cdpo_is_one_line_of_the_function_as_it_stands(monkeypatch):
    import inspect

    from utils.tasks import dpo_single

    source = inspect.getsource(dpo_single.preference_loss)
    line = "losses = -logsigmoid(chosen_rewards - rejected_rewards)"
    assert line in source
    names = dict(vars(dpo_single))
    exec(source.replace(line, CODE[1].strip()), names)
    losses, *_ = names["preference_loss"](*NUMBERS, beta=0.5)
    wanted = [
        -0.9 * torch.sigmoid(torch.tensor(m)).log() - 0.1 * torch.sigmoid(torch.tensor(-m)).log() for m in (0, 0.5)
    ]
    torch.testing.assert_close(losses, torch.stack(wanted).float())


def test_a_changed_loss_is_what_is_trained(train, tmp_path, monkeypatch):
    from utils.tasks import dpo_single

    names: dict = {}
    exec(CODE[0], names)
    monkeypatch.setattr(dpo_single, "preference_loss", names["preference_loss"])
    flags = ["--train_args_path", "train_args/dpo/base.py", "--task_type", "dpo_single", "--logging_steps", "1"]
    folder = train(*flags, "--beta", "0.5", data=write_rows(tmp_path / "pairs.jsonl", tiny.PAIRS))
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    assert history[0]["loss"] == pytest.approx(1.0)  # (0 - 1 / (2 * 0.5)) ** 2


def test_the_guides_table_is_what_was_measured():
    results = json.loads((ROOT / "benchmarks" / "dpo.json").read_text(encoding="utf-8"))
    assert table(results) in TEXT


@pytest.mark.parametrize("name", ["dpo_single", "dpo_multi"])
def test_the_samples_are_our_own_and_what_the_build_writes(name, tmp_path):
    from data.build.dpo_rows import write_pairs

    write_pairs(tmp_path)
    for part in ("data", "eval_data"):
        file = f"{name}_{part}.jsonl"
        lines = (ROOT / "data" / file).read_text(encoding="utf-8").splitlines()
        assert (tmp_path / file).read_text(encoding="utf-8").splitlines() == lines
        assert len(lines) >= (100 if part == "data" else 50)
    trained, held = ((tmp_path / f"{name}_{part}.jsonl").read_text(encoding="utf-8") for part in ("data", "eval_data"))
    asked = [[json.dumps(json.loads(line)["prompt"][-1:]) if name == "dpo_multi" else json.loads(line)["prompt"]
              for line in text.splitlines()] for text in (trained, held)]  # fmt: skip
    assert not set(asked[0]) & set(asked[1])
