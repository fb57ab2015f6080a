"""The command that plans a run's memory."""

import json
import shlex

import pytest
import tiny

from utils.args import parse_args
from utils.memory.activations import step_bytes
from utils.memory.report import PARTS
from utils.memory.search import LAYOUTS
from utils.model.options import CHECKPOINTING_FROM
from utils.script import plan_memory

SMALL = ["--max_len", "64", "--per_device_train_batch_size", "2"]
STEPS: dict = {}


def step_once(args, train_args, build, config, batch, laid_out, checkpointing):
    """A step that another test has run is not run again; all of them are of one model."""
    key = (args.train_mode, args.use_dora, batch, laid_out, checkpointing)
    if key not in STEPS:
        STEPS[key] = step_bytes(args, train_args, build, config, batch, laid_out, checkpointing)
    return STEPS[key]


@pytest.fixture
def plan(tmp_path, capsys, monkeypatch):
    """Runs the command on a folder that holds a config.json and nothing else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("utils.memory.planner.step_bytes", step_once)
    tiny.config_for("llama", 512).save_pretrained(tmp_path / "base")

    def run(*flags):
        capsys.readouterr()
        plan_memory.main(["--model_name_or_path", str(tmp_path / "base"), *SMALL, *flags])
        assert [path.name for path in tmp_path.iterdir()] == ["base"]  # it leaves nothing behind
        return capsys.readouterr().out

    return run


def test_the_table_the_formula_and_the_command(plan):
    out = plan("--gpus", "2", "--gpu_memory", "24", "--train_data_path", "not/here.jsonl", "--learning_rate", "1e-4")
    header, *lines = out[out.index("GB on each GPU") :].split("\n\n")[0].splitlines()
    assert header.split()[4:] == list(LAYOUTS)
    assert [line[:32].strip() for line in lines] == [
        name for mode in ("lora", "full", "dora", "qlora") for name in (mode, f"{mode}, gradient checkpointing")
    ]
    assert "✓" in lines[0]
    weights = 512 * 64 * 2 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 64 + 2 * 64) + 64
    assert f"= {weights:,} × 2 B + 26,624 × 4 B" in out
    for part in PARTS:
        assert f"  {part} " in out
    command = out.strip().splitlines()[-1]
    assert command.split()[:3] == ["torchrun", "--nproc_per_node", "2"]
    assert "--train_data_path not/here.jsonl" in command and "--gpu" not in command


def test_a_tiny_model_is_shown_in_mb(plan):
    out = plan("--tokens_per_row", "32", "--train_mode", "full", "--gradient_checkpointing", "false")
    assert "MB on each GPU" in out and "GB" not in out[out.index("full, none:") :].split("\n\n")[0]
    weights = 512 * 64 * 2 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 64 + 2 * 64) + 64
    assert f"  gradients    {weights * 4 / 1e6:>8.2f} MB" in out and "0.00" not in out


def test_json_is_in_bytes_and_its_parts_add_up(plan):
    told = json.loads(plan("--gpu_memory", "24", "--json", "true"))
    assert told["cheapest"] == {"mode": "lora", "layout": "none", "checkpointing": False} == told["own"]
    assert len(told["settings"]) == 4 * 2 * len(LAYOUTS)
    for line in told["settings"]:
        parts = sum(line[part] for part in PARTS)
        assert line["total"] == parts - line["overlap"]
        assert line["fits"] == (line["total"] + told["reserve"] <= 24e9)
        assert bool(line["host"]) == ("offload" in line["layout"])


def test_nothing_fits(plan, monkeypatch):
    assert "nothing fits 0.1 GB; the least is" in plan("--gpu_memory", "0.1")
    monkeypatch.setattr(plan_memory, "_gpu_memory", lambda: None)
    assert "give --gpu_memory" in plan()
    monkeypatch.setattr(plan_memory, "_gpu_memory", lambda: 24.0)
    assert "cheapest that fits 24 GB" in plan()


def test_the_next_cheaper_setting_where_the_first_does_not_fit(plan, monkeypatch):
    """What is wanted is told in bytes, so the limit is put between two settings."""
    told = json.loads(plan("--train_mode", "full", "--json", "true", "--gpus", "2", "--gpu_memory", "24"))
    found = {tuple(line[key] for key in ("mode", "layout", "checkpointing")): line for line in told["settings"]}
    dear, less = (found["full", "none", again]["total"] for again in (False, True))
    assert less < dear
    others = [found["full", layout, False]["total"] for layout in ("zero1", "zero2")]
    assert min(others) > dear  # their buckets are larger than this model
    between = (dear + less) / 2 + told["reserve"]
    out = plan("--train_mode", "full", "--gpus", "2", "--gpu_memory", str(between / 1e9))
    assert "full, none, gradient checkpointing:" in out
    assert out.strip().endswith("--train_mode full --gradient_checkpointing true")


def test_the_users_settings_are_kept(plan):
    told = json.loads(plan("--gradient_checkpointing", "true", "--deepspeed", "zero0", "--use_dora", "true",
                           "--json", "true", "--gpus", "2", "--gpu_memory", "24"))  # fmt: skip
    assert told["own"] == {"mode": "dora", "layout": "zero0", "checkpointing": True} == told["cheapest"]
    assert all(line["checkpointing"] for line in told["settings"])
    assert told["command"].startswith("deepspeed --num_gpus 2 main_train.py")
    words = shlex.split(told["command"])
    assert words.count("--deepspeed") == 1 and words[words.index("--deepspeed") + 1] == "zero0"


def test_tokens_trained_share_and_logits_change_the_estimate(plan):
    def first(*flags):
        flags = ["--json", "true", "--gradient_checkpointing", "false", "--precision", "fp32", *flags]
        return json.loads(plan(*flags))["settings"][0]

    usual = first()
    assert first("--tokens_per_row", "32")["activations"] < usual["activations"]
    assert first("--trained_share", "0.25")["logits"] < usual["logits"]
    assert first("--logits", "whole")["logits"] > 64 * 2 * 512 * 4


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--gpus", "0"], "--gpus 0 is not allowed; give a whole number from 1 to 8"),
        (["--gpu_memory", "-1"], "--gpu_memory -1 is not allowed"),
        (["--gpus", "two"], "'two' is not a number"),
        (["--tokens_per_row", "1"], "--tokens_per_row 1 is not allowed"),
        (["--trained_share", "0"], "--trained_share 0 is not allowed"),
        (["--deepspeed", "zero22"], "Did you mean 'zero2'"),
        (["--model_name_or_path", "no/such/model"], "does not exist"),
        (["--max_lenn", "5"], "Did you mean '--max_len'"),
        (["--gpus", "9", "--lora_rank", "0"], "2 errors"),
    ],
)
def test_bad_input(refused, flags, said):
    assert said in refused(plan_memory.main, *flags)


def test_a_folder_without_config_is_refused(refused, tmp_path):
    assert "has no config.json" in refused(plan_memory.main, "--model_name_or_path", str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "nothing_known"}')
    assert "cannot be loaded" in refused(plan_memory.main, "--model_name_or_path", str(tmp_path))


def test_training_itself_requires_weights(refused, tmp_path):
    import main_train

    tiny.config_for("llama", 512).save_pretrained(tmp_path)
    assert "has no *.safetensors" in refused(main_train.main, "--model_name_or_path", str(tmp_path))


def test_gradient_checkpointing_follows_the_models_size(tmp_path):
    """transformers makes False of an option that is left open, which would leave it off for a 7B as well."""
    from types import SimpleNamespace

    from utils.model.load import _resolve_checkpointing

    for size, wanted in ((CHECKPOINTING_FROM, True), (CHECKPOINTING_FROM - 1, False)):
        _, train_args = parse_args(["--output_dir", str(tmp_path / "run")])
        model = SimpleNamespace(num_parameters=lambda size=size: size, parameters=lambda: [])
        _resolve_checkpointing(model, train_args)
        assert train_args.gradient_checkpointing is train_args.activation_checkpointing is wanted
    _, train_args = parse_args(["--output_dir", str(tmp_path / "run"), "--gradient_checkpointing", "false"])
    assert train_args.gradient_checkpointing is False


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        plan_memory.main(["--help"])
    assert stop.value.code == 0 and "--gpu_memory" in capsys.readouterr().out
