"""What a resumed run does with settings that are others than the checkpoint's: used, or refused by name."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

import main_train
from utils.config.recipe import load_recipe
from utils.storage.run_folder import mark_complete
from utils.train.resume_rules import FIXED, FREE, LIVE, ORDER, SIZES, UPDATED, rule_of

STEPS = ["--precision", "fp32", "--save_strategy", "steps", "--save_steps", "2", "--logging_steps", "1",
         "--per_device_train_batch_size", "2", "--lr_scheduler_type", "linear", "--warmup_steps", "0"]  # fmt: skip


def history(folder, name="loss"):
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    return {entry["step"]: entry[name] for entry in state["log_history"] if name in entry}


@pytest.fixture
def begun(copied):
    """A run of six steps, with checkpoints after 2, 4 and 6."""
    return copied(*STEPS, "--max_steps", "6", "--save_total_limit", "9", output="begun")


@pytest.fixture
def resume(train, begun):
    def run(*flags, step=2, output="later"):
        return train(*STEPS, "--max_steps", "6", "--resume_from_checkpoint", str(begun / f"checkpoint-{step}"), *flags,
                     output=output)  # fmt: skip

    return run


@pytest.fixture
def group_of(monkeypatch):
    """Keeps the options of the optimizer's first group at every step."""
    seen = []
    step = torch.optim.AdamW.step

    def keep(self, *args, **kwargs):
        names = ("betas", "eps", "weight_decay")
        seen.append([{name: group[name] for name in names} for group in self.param_groups])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", keep)
    return seen


def test_fsdp_by_a_flag_keeps_the_optimizers_options_as_fsdp_by_accelerate_does():
    from types import SimpleNamespace

    from utils.train.resume import _why_not

    one = {"deepspeed_plugin": None, "lr_scheduler_type": SimpleNamespace(value="linear"),
           "optim": SimpleNamespace(value="adamw_torch")}  # fmt: skip
    assert _why_not("learning_rate", {}, SimpleNamespace(fsdp=None, **one)) is None
    assert "FSDP" in _why_not("learning_rate", {}, SimpleNamespace(fsdp=True, **one))


def test_every_setting_of_every_recipe_has_a_rule():
    """A field that TRL adds is to be decided on: `live` is only for what a recipe adds by itself."""
    rules = [FREE, LIVE, ORDER, FIXED, SIZES, UPDATED]
    known = set().union(*rules)
    for recipe in ("sft", "dpo", "pretrain"):
        for field in dataclasses.fields(load_recipe(f"train_args/{recipe}/base.py", frozenset())):
            assert field.name in known or rule_of(field.name) is None or not field.init, field.name
    assert len(known) == sum(map(len, rules))  # each in one


def test_the_same_settings_end_bit_for_bit(begun, resume):
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (resume(), begun))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert history(begun, "num_tokens") == history(begun / ".." / "later", "num_tokens")


def test_a_new_learning_rate_is_used_from_the_first_step_on(begun, resume):
    rates = history(resume("--learning_rate", "1e-5"), "learning_rate")
    before = history(begun, "learning_rate")
    assert [rates[step] for step in (1, 2)] == [before[1], before[2]]
    # linear to zero: 6 - (step - 1) sixths of it are left
    assert [rates[step] for step in (3, 4, 5, 6)] == pytest.approx([1e-5 * left / 6 for left in (4, 3, 2, 1)])


def test_more_steps_lengthen_the_schedule_at_once(begun, resume):
    rates, base = history(resume("--max_steps", "12"), "learning_rate"), history(begun, "learning_rate")[1]
    assert [rates[step] for step in (3, 4, 12)] == pytest.approx([base * left / 12 for left in (10, 9, 1)])


def test_another_schedule_and_warm_up_apply_at_once(begun, resume):
    rates = history(resume("--lr_scheduler_type", "constant_with_warmup", "--warmup_steps", "4"), "learning_rate")
    base = history(begun, "learning_rate")[1]
    assert [rates[step] for step in (3, 4, 5, 6)] == pytest.approx([base * share for share in (0.5, 0.75, 1, 1)])


def test_new_options_of_the_optimizer_are_used(begun, resume, group_of):
    resume("--weight_decay", "0.5", "--adam_beta1", "0.8", "--adam_beta2", "0.5", "--adam_epsilon", "1e-6")
    for groups in group_of:
        assert {group["weight_decay"] for group in groups} == {0.5, 0.0}
        assert {(*group["betas"], group["eps"]) for group in groups} == {(0.8, 0.5, 1e-6)}
    log = (begun / ".." / "later" / "train.log").read_text(encoding="utf-8")
    assert "resuming with adam_beta2 0.5, it was 0.999: the new value applies from here on" in log


def test_new_intervals_are_used(resume):
    folder = resume("--save_steps", "1", "--logging_steps", "3", "--save_total_limit", "9")
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in (3, 4, 5, 6)]
    assert list(history(folder)) == [1, 2, 3, 6]


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--seed", "7"], "seed 42, now: 7, and rows of the epoch would be trained twice"),
        (["--data_seed", "7"], "data_seed None, now: 7"),
        (["--train_sampling_strategy", "sequential"], "train_sampling_strategy random, now: sequential"),
        (["--dataloader_drop_last", "true"], "dataloader_drop_last False, now: True"),
        (["--lr_scheduler_type", "reduce_lr_on_plateau", "--eval_strategy", "steps"], "depends on its earlier steps"),
        (["--per_device_train_batch_size", "4"],
         "2 rows a step (1 process × 2 rows × 1 accumulated), now: 4 rows a step (1 process × 4 rows × 1 acc"),
        (["--gradient_accumulation_steps", "2"], "--gradient_accumulation_steps = 2 with these processes"),
        (["--optim_args", "foreach=False"], "optim_args None, now: foreach=False, and the optimizer keeps"),
        (["--optim", "adafactor"], "optim adamw_torch_fused, now: adafactor"),
    ],
)  # fmt: skip
def test_what_a_resume_cannot_do_is_refused(refused, begun, tiny_models, rows_file, tmp_path, flags, named):
    resume = ["--output_dir", str(tmp_path / "later"), "--resume_from_checkpoint", str(begun / "checkpoint-2")]
    argv = ["--model_name_or_path", tiny_models(), "--train_data_path", rows_file, *STEPS, "--max_steps", "6"]
    argv += [*resume, *flags]
    if "eval_strategy" in str(flags):
        argv += ["--eval_data_path", rows_file]
    assert named in refused(main_train.main, *argv)


def test_other_optimizers_keep_their_options_and_say_so(refused, train, tiny_models, rows_file, tmp_path):
    flags = [*STEPS, "--max_steps", "4", "--optim", "adafactor"]
    checkpoint = str(train(*flags) / "checkpoint-2")
    argv = ["--model_name_or_path", tiny_models(), "--train_data_path", rows_file, *flags, "--learning_rate", "1e-5",
            "--output_dir", str(tmp_path / "later"), "--resume_from_checkpoint", checkpoint]  # fmt: skip
    out = refused(main_train.main, *argv)
    assert "now: 1e-05, and the optimizer adafactor sets it back" in out
    assert f"start a new run from its weights: --adapter_name_or_path {checkpoint}, with another --output_dir" in out


def test_the_same_rows_a_step_in_smaller_batches_go_on(begun, resume):
    folder = resume("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2")
    assert list(history(folder).values()) == pytest.approx(list(history(begun).values()), rel=1e-5)
    assert "the same rows in every step" in (folder / "train.log").read_text(encoding="utf-8")


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_checkpoint_of_weights_alone_is_begun_from(refused, train, tiny_models, rows_file, tmp_path, mode):
    flags = [*STEPS, "--max_steps", "4", "--save_only_model", "true", "--train_mode", mode]
    checkpoint = train(*flags) / "checkpoint-2"
    argv = ["--model_name_or_path", tiny_models(), "--train_data_path", rows_file, *flags]
    resume = ["--output_dir", str(tmp_path / "later"), "--resume_from_checkpoint", str(checkpoint)]
    out = refused(main_train.main, *argv, *resume)
    assert "holds weights alone (--save_only_model true), so optimizer and schedule would start anew; start" in out
    # the remedy, as it says
    new = ["--model_name_or_path", str(checkpoint)] if mode == "full" else ["--adapter_name_or_path", str(checkpoint)]
    base = tiny_models() if mode == "lora" else str(checkpoint)
    main_train.main(["--model_name_or_path", base, "--train_data_path", rows_file, *flags, *new, "--report_to", "none",
                     "--output_dir", str(tmp_path / "new"), "--disable_tqdm", "true"])  # fmt: skip


def test_how_to_go_on_without_an_optimizer_is_a_new_run(tmp_path):
    from types import SimpleNamespace

    from utils.train.trainer import FaultTolerantTrainerMixin

    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "weights").write_text("x")
    mark_complete(tmp_path / "checkpoint-3", {})
    trainer = FaultTolerantTrainerMixin.__new__(FaultTolerantTrainerMixin)
    trainer.args = SimpleNamespace(output_dir=str(tmp_path), save_only_model=False)
    assert trainer.how_to_resume().endswith(f"--output_dir {tmp_path} --resume_from_checkpoint true")
    trainer.args.save_only_model, trainer.settings = True, {"must": {"train_mode": "lora"}}
    wanted = f"start a new run from its weights: --adapter_name_or_path {tmp_path}/checkpoint-3, with another"
    assert trainer.how_to_resume().startswith(wanted)


def test_deepspeed_keeps_the_checkpoints_options(tiny_models, rows_file, tmp_path):
    """Which is refused; more steps only lengthen the schedule."""
    from utils.args import parse_args
    from utils.train.resume import _why_not

    flags = ["--model_name_or_path", tiny_models(), "--train_data_path", rows_file, "--output_dir", str(tmp_path)]
    train_args = parse_args(flags)[1]
    then = {"lr_scheduler_type": "cosine"}
    assert _why_not("learning_rate", then, train_args) is None
    train_args.deepspeed_plugin = object()
    for name in ("learning_rate", "weight_decay", "adam_beta1", "warmup_steps", "lr_scheduler_type"):
        assert "DeepSpeed and FSDP set it back" in _why_not(name, then, train_args)
    assert _why_not("max_steps", then, train_args) is None


def test_other_validation_rows_are_warned_of(train, tmp_path, rows_file):
    flags = [*STEPS, "--eval_strategy", "steps", "--eval_steps", "2", "--eval_data_path", rows_file]
    checkpoint = train(*flags, "--max_steps", "4") / "checkpoint-2"
    other = tmp_path / "other.jsonl"
    lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines(True)
    other.write_text("".join(lines[:3]), encoding="utf-8")
    more = ["--eval_data_path", str(other), "--resume_from_checkpoint", str(checkpoint)]
    folder = train(*flags, *more, "--max_steps", "4", output="later")
    assert "resuming with other validation rows" in (folder / "train.log").read_text(encoding="utf-8")
