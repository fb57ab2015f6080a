"""Evaluation: each trained token counts once, the best weights are kept, and training stops early."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import tiny
import torch
from conftest import write_rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.matrix import two_processes
from utils.data.conversations import to_messages
from utils.run.summary import evaluation_summary
from utils.storage.run_folder import checkpoints_of, mark_complete
from utils.tasks import TASKS, get_task
from utils.template import get_template
from utils.train.callbacks import FindBest

# of very different lengths, and not a multiple of any step below
EVAL_ROWS = [
    *tiny.ROWS,
    {"instruction": "The fox?", "output": "The quick brown fox jumps over the lazy dog. " * 5},
    {"instruction": "3?", "output": "3"},
    {"instruction": "Who?", "output": "I am a helpful assistant."},
]
FULL = ["--train_mode", "full", "--precision", "fp32"]
ONCE = [*FULL, "--learning_rate", "0", "--max_steps", "1", "--eval_steps", "1"]  # the weights stay what they are
FORMS = {
    "padded": ["--padding_free", "false"],
    "padding-free": [],
    "packed": ["--packing", "true", "--max_len", "128"],
}


@pytest.fixture(scope="module")
def taught(tiny_models, tmp_path_factory):
    """A model that knows some of the rows, so that some of the tokens are right."""
    import main_train

    folder = tmp_path_factory.mktemp("taught")
    data = write_rows(folder / "rows.jsonl", tiny.ROWS)
    flags = ["--model_name_or_path", tiny_models(), "--train_data_path", data, "--output_dir", str(folder / "run")]
    flags += [*FULL, "--learning_rate", "0.003", "--num_train_epochs", "12", "--per_device_train_batch_size", "2"]
    main_train.main([*flags, "--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "true"])
    return str(folder / "run")


@pytest.fixture
def eval_file(tmp_path):
    return write_rows(tmp_path / "eval.jsonl", EVAL_ROWS)


def one_by_one(model_path, rows):
    """Loss, share of right tokens and entropy, row by row with a softmax over the whole vocabulary."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    losses, right, entropies = [], [], []
    for ids, labels in rows:
        with torch.no_grad():
            probabilities = model(torch.tensor([ids])).logits[0].double().softmax(dim=-1)
        for place in range(1, len(ids)):
            if labels[place] != -100:
                p = probabilities[place - 1]
                losses.append(-math.log(p[labels[place]]))
                right.append(int(p.argmax()) == labels[place])
                entropies.append(float(-(p * p.log()).sum()))
    return [sum(values) / len(values) for values in (losses, right, entropies)]


def conversations(tokenizer, rows):
    template = get_template("qwen")
    encoded = [template.encode(to_messages(row), tokenizer) for row in rows]
    return [(row["input_ids"], row["labels"]) for row in encoded]


def evaluations(folder):
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    return [entry for entry in state["log_history"] if "eval_loss" in entry]


def summary_of(folder):
    return json.loads((folder / "train_args.json").read_text(encoding="utf-8"))["summary"]


@pytest.fixture(scope="module")
def expected(taught):
    rows = conversations(AutoTokenizer.from_pretrained(taught), EVAL_ROWS)
    loss, right, entropy = one_by_one(taught, rows)
    assert 0.05 < right < 0.95
    return {
        "eval_loss": loss,
        "eval_perplexity": math.exp(loss),
        "eval_token_accuracy": right,
        "eval_entropy": entropy,
    }


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("form", FORMS)
def test_the_figures_are_those_of_rows_one_by_one(form, size, train, taught, eval_file, expected):
    more = ["--eval_data_path", eval_file, "--per_device_eval_batch_size", str(size), *FORMS[form]]
    folder = train(*ONCE, *more, model=taught)
    (found,) = evaluations(folder)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name
    assert "eval_mean_token_accuracy" not in found  # TRL's, the mean of batches
    for name in ("eval_loss", "eval_perplexity", "eval_token_accuracy"):
        assert summary_of(folder)[name] == found[name]
        assert f"{name} {found[name]:.6g}" in (folder / "train.log").read_text(encoding="utf-8")


@pytest.mark.parametrize("more", [["--dataloader_drop_last", "true"], ["--label_smoothing_factor", "0.2"]])
def test_all_rows_count_and_the_loss_is_the_cross_entropy(more, train, taught, eval_file, expected):
    more = ["--eval_data_path", eval_file, "--per_device_eval_batch_size", "4", *more]
    (found,) = evaluations(train(*ONCE, *more, model=taught))
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("packing", ["true", "false"])
def test_pretraining_counts_every_token_but_the_first(packing, train, taught, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(taught)
    texts = [row["output"] for row in EVAL_ROWS]
    data = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    rows = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    loss, right, entropy = one_by_one(taught, [(row, row) for row in rows])
    flags = ["--train_args_path", "train_args/pretrain/base.py", "--eval_data_path", data, "--packing", packing]
    folder = train(*ONCE, *flags, "--max_len", "256", "--per_device_eval_batch_size", "2", model=taught, data=data)
    (found,) = evaluations(folder)
    names = ("eval_loss", "eval_perplexity", "eval_token_accuracy", "eval_entropy")
    assert [found[name] for name in names] == pytest.approx([loss, math.exp(loss), right, entropy], rel=1e-5)


def test_logits_of_the_whole_step_are_never_there(train, taught, eval_file, monkeypatch):
    """No tensor of an evaluation is larger than a chunk of the head, of the weights or of the attention."""
    import trl.kernels.chunked_logprob as kernel
    import trl.trainer.utils
    from torch.utils._python_dispatch import TorchDispatchMode

    from utils.train.eval_metrics import TokenWeightedEvalMixin

    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape[-1:] and result._base is None:
                largest.append(tuple(result.shape))
            return result

    step = TokenWeightedEvalMixin.prediction_step

    def watched(self, *args, **kwargs):
        with Watch():
            return step(self, *args, **kwargs)

    monkeypatch.setattr(TokenWeightedEvalMixin, "prediction_step", watched)
    monkeypatch.setattr(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 100)
    monkeypatch.setattr(kernel, "TOKEN_CHUNK_SIZE", 64)
    train(*ONCE, "--eval_data_path", eval_file, "--per_device_eval_batch_size", "8", model=taught)
    assert largest
    vocabulary = AutoModelForCausalLM.from_pretrained(taught).config.vocab_size
    assert [shape for shape in largest if shape[-1] == 100], "the head went over no chunk"
    assert not [shape for shape in largest if shape[-1] >= vocabulary and math.prod(shape) > vocabulary]


# ------------------------------------------------------------------ the best weights
# what the model knows is unlearned, so that it soon becomes worse
OTHER_ROWS = [{**row, "output": "Be brief, please! " + row["output"][::-1]} for row in tiny.ROWS]
WORSE = [
    "--precision", "fp32", "--learning_rate", "0.01", "--warmup_steps", "0", "--lr_scheduler_type", "constant",
    "--eval_steps", "2", "--save_steps", "2", "--save_strategy", "steps", "--max_steps", "24",
    "--save_total_limit", "1",
]  # fmt: skip
KINDS = {
    "lora": ["--train_special_tokens", "on"],
    "dora": ["--use_dora", "true", "--train_special_tokens", "on"],
    "pissa": ["--init_lora_weights", "pissa"],
    "qlora": ["--train_mode", "qlora", "--train_special_tokens", "off"],
    "full": ["--train_mode", "full", "--learning_rate", "0.001"],
}


@pytest.fixture
def worsen(train, taught, eval_file, tmp_path):
    """A run whose evaluation becomes worse."""

    def run(*flags, **more):
        data = write_rows(tmp_path / "other.jsonl", OTHER_ROWS)
        return train(*WORSE, "--eval_data_path", eval_file, *flags, model=taught, data=data, **more)

    return run


def weights_of(folder):
    name = "model.safetensors" if (folder / "model.safetensors").is_file() else "adapter_model.safetensors"
    return load_file(folder / name)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def at_start(name, weight, like):
    """A PiSSA adapter is saved with the start it goes against beside it; this is the part that was trained."""
    return weight[: like.shape[0]] if "lora_A" in name else weight[:, : like.shape[1]] if "lora_B" in name else weight


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_checkpoint_is_kept_and_its_weights_are_the_runs(kind, worsen, capfd):
    folder = worsen(*KINDS[kind], "--early_stopping_patience", "3")
    found = evaluations(folder)
    best = min(found, key=lambda entry: entry["eval_loss"])
    assert best["step"] < found[-1]["step"] < 24, "the run never became worse: the test tests nothing"
    assert found[-1]["step"] == best["step"] + 6  # three evaluations
    assert [path.name for path in checkpoints_of(folder)] == [
        f"checkpoint-{best['step']}", f"checkpoint-{found[-1]['step']}",
    ]  # fmt: skip
    ours, theirs = weights_of(folder), weights_of(folder / f"checkpoint-{best['step']}")
    if kind == "pissa":
        ours = {name: at_start(name, weight, theirs[name]) for name, weight in ours.items()}
    assert same(ours, theirs)
    assert not same(theirs, weights_of(checkpoints_of(folder)[-1]))
    assert any("trainable_tokens" in name for name in theirs) == (kind not in ("qlora", "full"))
    summary = summary_of(folder)
    assert (summary["best_step"], summary["best_kept"], summary["eval_loss"]) == (best["step"], True, best["eval_loss"])
    said = capfd.readouterr().err
    assert f"step {found[-1]['step']}: no better eval_loss in 3 evaluations" in said
    assert f"best step        {best['step']} by eval_loss, saved is that step" in said


def test_a_run_that_becomes_better_by_too_little_says_so(train, tmp_path, capfd):
    rows = write_rows(tmp_path / "same.jsonl", tiny.ROWS)
    flags = ["--eval_data_path", rows, "--eval_steps", "1", "--save_steps", "1", "--save_strategy", "steps"]
    flags += ["--max_steps", "6", "--learning_rate", "1e-3", "--warmup_steps", "0"]
    folder = train(*flags, "--early_stopping_patience", "2", "--early_stopping_threshold", "1.5")
    losses = [entry["eval_loss"] for entry in evaluations(folder)]
    assert len(losses) == 3 and losses == sorted(losses, reverse=True) and losses[0] != losses[-1], "it did not improve"
    said = capfd.readouterr().err
    assert "step 3: no evaluation was better by 1.5 than the best eval_loss before it, 2 times in a row" in said
    assert "no better eval_loss" not in said


def test_a_best_step_that_was_not_to_be_saved_is_saved(worsen):
    folder = worsen("--load_best_model_at_end", "true", "--save_steps", "8", "--max_steps", "16")
    best = summary_of(folder)["best_step"]
    assert best % 8, "it was to be saved anyway: the test tests nothing"
    assert same(weights_of(folder), weights_of(folder / f"checkpoint-{best}"))


def test_more_is_better_of_accuracy_and_less_of_perplexity(worsen):
    for figure, pick in (("token_accuracy", max), ("eval_perplexity", min)):
        more = ["--metric_for_best_model", figure, "--load_best_model_at_end", "true", "--max_steps", "12"]
        folder = worsen(*more, output=figure)
        values = {entry["step"]: entry[f"eval_{figure.removeprefix('eval_')}"] for entry in evaluations(folder)}
        assert values[summary_of(folder)["best_step"]] == pick(values.values()) != values[12]


def test_without_it_the_last_weights_are_saved_and_the_best_step_is_told(worsen, capfd):
    folder = worsen("--max_steps", "12")
    summary, found = summary_of(folder), evaluations(folder)
    assert (summary["eval_step"], summary["eval_loss"], summary["best_kept"]) == (12, found[-1]["eval_loss"], False)
    assert summary["best_step"] == min(found, key=lambda entry: entry["eval_loss"])["step"] < 12
    assert "saved is the last step; --load_best_model_at_end true keeps the best" in capfd.readouterr().err
    assert same(weights_of(folder), weights_of(folder / "checkpoint-12"))


def test_a_resumed_run_stops_where_the_whole_one_does(worsen):
    flags = ["--early_stopping_patience", "3", "--save_total_limit", "20"]
    whole, cut = worsen(*flags, output="whole"), worsen(*flags, output="cut")
    stopped, best = evaluations(whole)[-1]["step"], summary_of(whole)["best_step"]
    shutil.rmtree(cut / f"checkpoint-{stopped}")  # as if it had died: two of three evaluations were no better
    again = worsen(*flags, "--resume_from_checkpoint", "true", output="cut")
    assert (evaluations(again)[-1]["step"], summary_of(again)["best_step"]) == (stopped, best)
    assert same(weights_of(again), weights_of(whole))
    # finished, it trains nothing more
    steps = [path.name for path in checkpoints_of(again)]
    again = worsen(*flags, "--resume_from_checkpoint", "true", output="cut")
    assert [path.name for path in checkpoints_of(again)] == steps and same(weights_of(again), weights_of(whole))
    assert summary_of(again)["steps"] == stopped


def test_a_resumed_run_looks_for_the_best_among_the_steps_before(worsen):
    """Neither was the best looked for before, nor by this figure; the checkpoint gone on from is it."""
    worsen("--max_steps", "2")
    more = ["--early_stopping_patience", "1", "--resume_from_checkpoint", "true"]
    folder = worsen(*more)
    assert (summary_of(folder)["best_kept"], summary_of(folder)["best_step"], summary_of(folder)["steps"]) == (
        True,
        2,
        4,
    )
    assert same(weights_of(folder), weights_of(folder / "checkpoint-2"))
    folder = worsen(*more, "--metric_for_best_model", "token_accuracy", "--early_stopping_patience", "2")
    values = {entry["step"]: entry["eval_token_accuracy"] for entry in evaluations(folder)}
    assert len(values) > 2 and values[summary_of(folder)["best_step"]] == max(values.values())


@pytest.mark.parametrize(("more_is_better", "best"), [(True, 6), (False, 4)])
def test_the_best_of_the_steps_before_is_looked_up_either_way(tmp_path, more_is_better, best):
    """By the figure asked for, among the steps whose checkpoints are whole; of equal ones the first."""
    from transformers import TrainerControl, TrainerState

    for step in (2, 4, 6, 8, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "weights").write_text("x")
        mark_complete(tmp_path / f"checkpoint-{step}", {})
    values = {1: 0.99, 2: 0.5, 3: 0.01, 4: 0.2, 6: 0.9, 8: 0.9, 10: math.nan}  # of 1 and 3 there is no checkpoint
    state = TrainerState(log_history=[{"step": step, "eval_figure": value} for step, value in values.items()])
    args = SimpleNamespace(
        load_best_model_at_end=True, resume_from_checkpoint=str(tmp_path / "checkpoint-10"), output_dir=str(tmp_path),
        metric_for_best_model="eval_figure", greater_is_better=more_is_better,
    )  # fmt: skip
    FindBest().on_train_begin(args, state, TrainerControl())
    assert (state.best_global_step, state.best_metric) == (best, values[best])
    assert state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")


@pytest.mark.parametrize(("more_is_better", "best"), [(True, 4), (False, 6), (None, 6)])
def test_the_summary_of_the_best_step_goes_by_what_is_better(more_is_better, best):
    args = SimpleNamespace(
        metric_for_best_model="eval_figure", greater_is_better=more_is_better, load_best_model_at_end=False
    )
    values = {2: 0.5, 4: 0.9, 6: 0.1, 8: 0.3, 10: math.nan}
    history = [{"step": step, "eval_loss": 1.0, "eval_figure": value} for step, value in values.items()]
    state = SimpleNamespace(log_history=history, best_model_checkpoint=None, best_global_step=None)
    summary = evaluation_summary(SimpleNamespace(args=args, state=state))
    assert (summary["best_step"], summary["best_figure"], summary["best_kept"]) == (best, "eval_figure", False)
    assert summary["eval_step"] == 10  # the last weights are saved


@pytest.mark.parametrize("task", TASKS)
def test_every_figure_of_the_table_is_one_a_run_has(task, train, tiny_models, tmp_path):
    kind = task.split("_")[0]
    rows = {"pretrain": [{"text": row["output"]} for row in tiny.ROWS], "sft": tiny.ROWS, "dpo": tiny.PAIRS}[kind]
    data = write_rows(tmp_path / "data.jsonl", rows)
    flags = ["--train_args_path", f"train_args/{kind}/base.py", "--task_type", task, "--eval_data_path", data]
    (found,) = evaluations(train(*flags, "--max_steps", "1", "--eval_steps", "1", data=data))
    assert {f"eval_{name}" for name in get_task(task).metrics} <= found.keys()


def launch(launcher, *flags):
    if launcher == "torchrun":
        from test_launch import launched

        return launched("torchrun --nproc_per_node 2 main_train.py", list(flags))
    return two_processes(["main_train.py", "--deepspeed", launcher, *flags])


@pytest.mark.slow
@pytest.mark.usefixtures("fast_processes")
@pytest.mark.parametrize("form", ["packed"])
def test_two_processes_have_the_figures_of_one(form, taught, eval_file, rows_file, expected, tmp_path):
    """Eleven rows on two processes of three: the last step is filled up."""
    folder = tmp_path / "run"
    flags = [
        "--model_name_or_path", taught, "--train_data_path", rows_file, "--eval_data_path", eval_file, *ONCE,
        "--output_dir", str(folder), "--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "3",
        "--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "true", *FORMS[form],
    ]  # fmt: skip
    done = launch("torchrun", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = evaluations(folder)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("fast_processes")
@pytest.mark.parametrize("launcher, kind", [("torchrun", "lora"), ("zero2", "dora"), ("zero3", "full")])
def test_two_processes_stop_early_with_the_best_weights(launcher, kind, taught, eval_file, tmp_path):
    folder = tmp_path / "run"
    flags = [
        "--model_name_or_path", taught, "--train_data_path", write_rows(tmp_path / "other.jsonl", OTHER_ROWS),
        "--eval_data_path", eval_file, *WORSE, *KINDS[kind], "--output_dir", str(folder), "--report_to", "none",
        "--per_device_train_batch_size", "2", "--early_stopping_patience", "2", "--disable_tqdm", "true",
    ]  # fmt: skip
    done = launch(launcher, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = summary_of(folder)
    assert summary["best_kept"] and summary["best_step"] + 4 == summary["steps"]
    assert same(weights_of(folder), weights_of(folder / f"checkpoint-{summary['best_step']}"))
    assert not same(weights_of(folder), weights_of(folder / f"checkpoint-{summary['steps']}"))
    if kind == "full":
        rows = conversations(AutoTokenizer.from_pretrained(taught), EVAL_ROWS)
        found = [summary["eval_loss"], summary["eval_token_accuracy"]]
        assert found == pytest.approx(one_by_one(folder, rows)[:2], rel=1e-5)
