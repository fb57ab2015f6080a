"""Micro-batches of different sizes: every pair, and every token, counts once in its update."""

import json

import pytest
import tiny
import torch
from conftest import write_rows
from peft import PeftModel
from safetensors.torch import load_file
from test_dpo import MODES, plain_log_prob, task_trainers  # noqa: F401  (a fixture)
from torch.nn.functional import logsigmoid

STEPS = ["--precision", "fp32", "--logging_steps", "1", "--num_train_epochs", "1", "--optim", "sgd", "--learning_rate",
         "1", "--max_grad_norm", "0", "--lr_scheduler_type", "constant", "--warmup_steps", "0"]  # fmt: skip


def plain_dpo(model, pairs, beta):
    """The mean loss of all pairs at once, in plain PyTorch."""
    losses = []
    for pair in pairs:
        policy = [plain_log_prob(model, pair, side) for side in ("chosen", "rejected")]
        with torch.no_grad(), model.disable_adapter():
            reference = [plain_log_prob(model, pair, side) for side in ("chosen", "rejected")]
        losses.append(-logsigmoid(beta * (policy[0] - reference[0] - policy[1] + reference[1])))
    return torch.stack(losses).mean()


def gradients(model):
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}


def accumulated(trainer, rows, sizes):
    """The summed losses and the gradients of an update in micro-batches of these sizes, as transformers makes it."""
    batches, start = [], 0
    for size in sizes:
        batches.append(trainer.data_collator(rows[start : start + size]))
        start += size
    items, trainer.current_gradient_accumulation_steps = trainer._get_num_items_in_batch(batches, "cpu"), len(batches)
    loss = sum(trainer.training_step(trainer.model, batch, items) for batch in batches)
    return loss, gradients(trainer.model)


@pytest.mark.parametrize("mode", MODES)
def test_pairs_of_a_short_micro_batch_count_as_others_do(task_trainers, mode):  # noqa: F811
    trainer, rows = task_trainers(mode, "lora")
    assert isinstance(trainer.model, PeftModel)
    plain = plain_dpo(trainer.model, rows[:5], trainer.beta)
    plain.backward()
    wanted = gradients(trainer.model)
    trainer.model.zero_grad()
    loss, found = accumulated(trainer, rows, (2, 2, 1))
    torch.testing.assert_close(loss.double(), plain.detach(), rtol=1e-5, atol=1e-6)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)
    assert max(gradient.abs().max() for gradient in wanted.values()) > 1e-3


def plain_figures(model, pairs):
    """The figures of the pairs' trained tokens, one row at a time, from whole logits."""
    parts = {"chosen": [], "rejected": []}
    for pair in pairs:
        for side, found in parts.items():
            ids = torch.tensor([pair["prompt_ids"] + pair[f"{side}_ids"]])
            labels = torch.tensor([-100] * len(pair["prompt_ids"]) + pair[f"{side}_labels"])[1:]
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, :-1][labels != -100].float()
            log_probs, labels = logits.log_softmax(-1), labels[labels != -100]
            entropy, right = -(log_probs.exp() * log_probs).sum(-1), logits.argmax(-1) == labels
            found.append(torch.stack([logits.mean(-1), entropy, right.float()]))
    (mean_c, entropy_c, right_c), (mean_r, entropy_r, _) = (torch.cat(found, 1) for found in parts.values())
    return {
        "logits/chosen": mean_c.mean().item(),
        "logits/rejected": mean_r.mean().item(),
        "entropy": torch.cat([entropy_c, entropy_r]).mean().item(),
        "mean_token_accuracy": right_c.mean().item(),
    }


@pytest.mark.parametrize("sizes", [(5,), (2, 2, 1), (1, 1, 1, 1, 1)])
def test_figures_of_an_update_are_means_over_its_tokens(task_trainers, sizes):  # noqa: F811
    trainer, rows = task_trainers("dpo_multi", "lora")
    rows = sorted(rows, key=lambda row: len(row["chosen_ids"]))[:5]  # of different lengths
    wanted = plain_figures(trainer.model, rows)
    trainer.model.train()
    trainer._metrics["train"].clear()
    accumulated(trainer, rows, sizes)
    logged = {}
    trainer.log(logged)
    assert {name: logged[name] for name in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_process_whose_pairs_only_fill_up_a_step_changes_no_figure(task_trainers, mode, monkeypatch):  # noqa: F811
    """One process alone, then with a second one, which gathers what the first one did, call by call."""
    trainer, rows = task_trainers(mode, "lora")
    trainer.model.train()
    first = []

    def gather_alone(values):
        first.append(values)
        return values

    def gather_of_two(values):
        return torch.cat([first.pop(0).reshape(-1), values.reshape(-1)])

    def figures_of(batches, source, gather):
        monkeypatch.setattr(trainer.accelerator, "gather", gather)
        trainer._metrics["train"].clear()
        trainer._total_train_tokens, logged = 0, {}
        for pairs in batches:
            with torch.no_grad():
                trainer.compute_loss(trainer.model, trainer.data_collator([{**row, "source": source} for row in pairs]))
        trainer.log(logged)
        return logged

    alone = figures_of([rows[:2], rows[2:4]], [1], gather_alone)
    assert figures_of([rows[4:5] * 2] * 2, [], gather_of_two) == pytest.approx(alone, rel=1e-6) and len(alone) > 5


def losses_and_weights(folder):
    log = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry], load_file(folder / "adapter_model.safetensors")


FIGURES = ("entropy", "mean_token_accuracy", "num_tokens", "grad_norm", "logits/chosen", "logits/rejected",
           "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
           "logps/rejected")  # fmt: skip


def figures(folder):
    """Every figure of each line of the training's log."""
    log = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [{name: entry[name] for name in FIGURES if name in entry} for entry in log if "loss" in entry]


def the_same(one, other):
    assert one[0] == pytest.approx(other[0], rel=1e-5) and one[1].keys() == other[1].keys()
    for name in one[1]:
        torch.testing.assert_close(one[1][name], other[1][name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("task", ["sft", *MODES])
def test_a_run_in_micro_batches_is_the_run_in_batches(train, tmp_path, task):
    """Seven rows, four an update, in batches of 4 and 3, in micro-batches of 2, 2 and 2, 1, and of 1 each."""
    flags, rows = [*STEPS, "--task_type", task], tiny.ROWS[:7]
    if task != "sft":
        flags, rows = ["--train_args_path", "train_args/dpo/base.py", *flags], tiny.PAIRS[:7]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    whole = train(*flags, "--per_device_train_batch_size", "4", data=data, output="whole")
    for size, steps in ((2, 2), (1, 4)):
        given = ["--per_device_train_batch_size", str(size), "--gradient_accumulation_steps", str(steps)]
        parts = train(*flags, *given, data=data, output=f"parts-{size}")
        the_same(losses_and_weights(parts), losses_and_weights(whole))
        for found, wanted in zip(figures(parts), figures(whole), strict=True):
            assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)
            assert set(found) >= {"sft": {"entropy"}, "dpo_multi": {"logits/chosen", "entropy"}}.get(task, set())


# ---------------------------------------------------------------------- several processes
def test_batches_are_equal_and_full_and_each_row_comes_once():
    from utils.train.filler import FullBatches

    assert list(FullBatches(range(5), 2, processes=2, filler=5)) == [[0, 1], [2, 3], [4, 5], [5, 5]]
    for rows in range(1, 20):
        for size in (1, 2, 3):
            for processes in (2, 3):
                batches = list(full := FullBatches(range(rows), size, processes, filler=rows))
                assert len(batches) == len(full) and len(batches) % processes == 0
                assert all(len(batch) == size for batch in batches) and len(batches) < rows / size + processes
                assert [row for batch in batches for row in batch if row < rows] == list(range(rows))


def on_two(tmp_path, model, data, name, *flags):
    from test_launch import launched

    run = ["--model_name_or_path", model, "--train_data_path", data, *STEPS, *flags, "--report_to", "none",
           "--disable_tqdm", "true", "--output_dir", str(tmp_path / name)]  # fmt: skip
    done = launched("torchrun --nproc_per_node 2 main_train.py", run)
    assert done.returncode == 0, done.stderr[-3000:]
    return tmp_path / name, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("fast_processes")
@pytest.mark.parametrize("padding_free", ["true", "false"])
@pytest.mark.parametrize(("rows", "size", "steps"), [(5, 2, 1), (7, 1, 2)])
def test_two_processes_train_each_row_once(train, tiny_models, tmp_path, padding_free, rows, size, steps):
    """Of five rows, one in the last step, and three that train nothing; of seven, three in two micro-batches."""
    data, flags = write_rows(tmp_path / "rows.jsonl", tiny.ROWS[:rows]), ["--padding_free", padding_free]
    one = train(*STEPS, *flags, "--per_device_train_batch_size", "4", data=data, output="one")
    flags += ["--per_device_train_batch_size", str(size), "--gradient_accumulation_steps", str(steps)]
    two, _ = on_two(tmp_path, tiny_models(), data, "two", *flags)
    the_same(losses_and_weights(two), losses_and_weights(one))
    for found, wanted in zip(figures(two), figures(one), strict=True):
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6) and "entropy" in found


def evaluations(folder):
    log = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    names = [f"eval_{name}" for name in ("loss", *FIGURES)]
    return [{name: entry[name] for name in names if name in entry} for entry in log if "eval_loss" in entry]


@pytest.mark.slow
@pytest.mark.usefixtures("fast_processes")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pairs", [5, 7])
def test_two_processes_of_pairs_are_one(train, tiny_models, tmp_path, mode, pairs):
    """Updates of 4 and 3, and of 4 and 1, where one process has no pair left; the same in evaluation."""
    data = write_rows(tmp_path / "pairs.jsonl", tiny.PAIRS[:pairs])
    flags = ["--train_args_path", "train_args/dpo/base.py", "--task_type", mode, "--eval_data_path", data,
             "--eval_strategy", "steps", "--eval_steps", "1"]  # fmt: skip
    sizes = ["--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "4"]
    one = train(*STEPS, *flags, *sizes, data=data, output="one")
    sizes = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2"]
    two, _ = on_two(tmp_path, tiny_models(), data, "two", *flags, *sizes, "--per_device_eval_batch_size", "2")
    the_same(losses_and_weights(two), losses_and_weights(one))
    for found, wanted in zip(figures(two) + evaluations(two), figures(one) + evaluations(one), strict=True):
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    assert len(figures(one)) == len(evaluations(one)) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("fast_processes")
def test_a_run_goes_on_with_other_processes_at_the_same_row(train, tiny_models, tmp_path):
    """One process of two rows, then two of one, in the middle of the second epoch; seven rows in an epoch."""
    data = write_rows(tmp_path / "rows.jsonl", tiny.ROWS[:7])
    flags = ["--num_train_epochs", "3", "--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "99"]
    one = train(*STEPS, *flags, "--per_device_train_batch_size", "2", data=data, output="one")
    resume = ["--resume_from_checkpoint", str(one / "checkpoint-6"), "--per_device_train_batch_size", "1"]
    two, said = on_two(tmp_path, tiny_models(), data, "two", *flags, *resume)
    assert "the same rows in every step" in said
    the_same(losses_and_weights(two), losses_and_weights(one))
