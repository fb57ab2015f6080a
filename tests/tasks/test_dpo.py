"""DPO: both modes against each other, against TRL and against a plain softmax, under every kind of training."""

import json
import math

import pytest
import tiny
import torch
from conftest import write_rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from utils.data.collate import build_pair_collator, build_trl_pair_collator
from utils.tasks.dpo_checks import LOSS_TYPES
from utils.tasks.dpo_single import preference_loss, sequence_log_probs

DPO = ["--train_args_path", "train_args/dpo/base.py", "--precision", "fp32", "--logging_steps", "1"]
MODES = ("dpo_multi", "dpo_single")
ADAPTERS = {
    "full": ["--train_mode", "full"],
    "lora": [],
    "rslora": ["--use_rslora", "true"],
    "dora": ["--use_dora", "true"],
    "pissa": ["--init_lora_weights", "pissa"],
    "loraplus": ["--loraplus_lr_ratio", "4"],
    "trained_tokens": ["--train_special_tokens", "on"],
    "qlora": ["--train_mode", "qlora"],
    "qlora_dora": ["--train_mode", "qlora", "--use_dora", "true"],
}
PAIRS = [
    {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 10, 11], "chosen_labels": [8, 9, 10, 11],
     "rejected_ids": [12, 13], "rejected_labels": [12, 13]},
    {"prompt_ids": [14], "chosen_ids": [15, 16], "chosen_labels": [-100, 16],
     "rejected_ids": [17, 18, 19, 20, 21, 22], "rejected_labels": [17, 18, -100, -100, 21, 22]},
]  # fmt: skip


@pytest.fixture
def pairs_file(tmp_path):
    return write_rows(tmp_path / "pairs.jsonl", tiny.PAIRS)


@pytest.fixture
def train_dpo(train, pairs_file):
    """Trains on the pairs; returns the folder and what was logged at each step."""

    def run(*flags, output="run", data=None, **options):
        folder = train(*DPO, *flags, data=data or pairs_file, output=output, **options)
        return folder, steps_of(folder)

    return run


@pytest.fixture
def dpo_steps(trained):
    """What was logged at each step of a run on the pairs that all tests share."""
    return lambda *flags: steps_of(trained(*DPO, *flags, rows=tiny.PAIRS))


def steps_of(folder):
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [entry for entry in history if "loss" in entry]


def test_trl_collator_trains_only_what_the_labels_say():
    batch = build_trl_pair_collator(0)(PAIRS)
    assert batch["input_ids"].tolist() == [
        [5, 6, 7, 8, 9, 10, 11], [14, 15, 16, 0, 0, 0, 0], [5, 6, 7, 12, 13, 0, 0], [14, 17, 18, 19, 20, 21, 22]
    ]  # fmt: skip
    assert batch["completion_mask"].tolist() == [
        [0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0, 0], [0, 1, 1, 0, 0, 1, 1]
    ]  # fmt: skip


def test_own_collator_padded():
    batch = build_pair_collator(0, padding_free=False)(PAIRS[:1])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 12, 13, 0, 0]]
    assert batch["labels"].tolist() == [[-100] * 3 + [8, 9, 10, 11], [-100] * 3 + [12, 13, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1] * 7, [1] * 5 + [0] * 2]
    assert batch["row"].tolist() == [[0] * 7, [1] * 7]


def test_own_collator_padding_free():
    batch = build_pair_collator(0, padding_free=True)(PAIRS[:1])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 5, 6, 7, 12, 13]]
    assert batch["labels"].tolist() == [[-100] * 3 + [8, 9, 10, 11] + [-100] * 3 + [12, 13]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4]]
    assert batch["row"].tolist() == [[0] * 7 + [1] * 5]
    assert "attention_mask" not in batch


def plain_log_prob(model, pair, side):
    """A row by itself, softmax over the whole vocabulary, trained tokens added up one by one."""
    ids = pair["prompt_ids"] + pair[f"{side}_ids"]
    labels = [-100] * len(pair["prompt_ids"]) + pair[f"{side}_labels"]
    probabilities = torch.softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
    return sum(torch.log(probabilities[i - 1, token]) for i, token in enumerate(labels) if token != -100)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("padding_free", [True, False])
def test_log_probs_are_those_of_a_plain_softmax(architecture, padding_free, tiny_models):
    model = AutoModelForCausalLM.from_pretrained(tiny_models(architecture), dtype=torch.float32)
    with torch.no_grad():
        found, output = sequence_log_probs(model, build_pair_collator(0, padding_free)(PAIRS))
        plain = [plain_log_prob(model, pair, side) for side in ("chosen", "rejected") for pair in PAIRS]
    torch.testing.assert_close(found.double(), torch.stack(plain), rtol=1e-6, atol=1e-5)
    # end to end there are logits for the trained tokens alone, which are 4, 1, 2 and 4
    assert output.logits.shape[1] == (11 if padding_free else 6)


@pytest.mark.parametrize("architecture", tiny.VARIANTS)
@pytest.mark.parametrize("padding_free", [True, False])
def test_log_probs_and_gradients_where_logits_are_changed_or_attention_has_a_window(
    architecture, padding_free, tiny_models
):
    """With rows that are longer than the window."""
    model = AutoModelForCausalLM.from_pretrained(tiny_models(architecture), dtype=torch.float32)
    answer = list(range(30, 55))
    pairs = [*PAIRS, {"prompt_ids": [5, 6], "chosen_ids": answer, "chosen_labels": answer, "rejected_ids": answer[::-1],
                      "rejected_labels": answer[::-1]}]  # fmt: skip
    plain = torch.stack([plain_log_prob(model, pair, side) for side in ("chosen", "rejected") for pair in pairs])
    weights = torch.linspace(-1, 1, len(plain))  # of the loss, another for each row
    (plain.float() * weights).sum().backward()
    expected = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()
    found, _ = sequence_log_probs(model, build_pair_collator(0, padding_free)(pairs))
    torch.testing.assert_close(found.double(), plain, rtol=1e-5, atol=1e-5)
    (found * weights).sum().backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name], rtol=1e-3, atol=1e-4, msg=name)


def test_loss_is_the_papers():
    chosen, rejected, ref_chosen, ref_rejected = torch.tensor([[-3.0, -1.0], [-2.0, -9.0], [-3.5, -1.0], [-2.5, -8.0]])
    losses, reward, other = preference_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.5)
    assert reward.tolist() == [0.25, 0.0] and other.tolist() == [0.25, -0.5]
    wanted = [-math.log(1 / (1 + math.exp(-margin))) for margin in (0.0, 0.5)]
    torch.testing.assert_close(losses, torch.tensor(wanted))


@pytest.fixture(scope="module")
def task_trainers(tiny_models, tmp_path_factory):
    """The trainer of each mode on one model whose policy has left its reference."""

    def build(mode, kind, *flags):
        import main_train  # noqa: F401  (sets the path)
        from utils.args import parse_args
        from utils.model.adapter import build_adapter
        from utils.model.load import load_model
        from utils.model.tokenizer import load_tokenizer
        from utils.tasks import get_task
        from utils.template import get_template

        folder = tmp_path_factory.mktemp(mode)
        data = write_rows(folder / "pairs.jsonl", tiny.PAIRS)
        args, train_args = parse_args(
            [*DPO, *ADAPTERS[kind], "--task_type", mode, "--model_name_or_path", tiny_models(), "--train_data_path",
             data, "--output_dir", str(folder / "run"), "--report_to", "none", *flags]
        )  # fmt: skip
        task = get_task(mode)
        tokenizer = load_tokenizer(args.model_name_or_path)
        template = get_template(args.template_name, tokenizer)
        rows = task.load_datasets(args, train_args, template, tokenizer)
        collator = task.build_collator(args, train_args, tokenizer)
        model = load_model(args, train_args)
        adapter = build_adapter(args, model, tokenizer, template)
        trainer = task.build_trainer(args, train_args, model, adapter, rows, collator, tokenizer)
        generator = torch.Generator().manual_seed(1)
        for weight in trainer.model.parameters():
            if weight.requires_grad:
                weight.data += 0.02 * torch.randn(weight.shape, generator=generator)
        return trainer, [dict(row) for row in rows.train]

    return build


def loss_gradients_rewards(trainer, rows):
    batch = trainer.data_collator(rows)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {name: weight.grad for name, weight in trainer.model.named_parameters() if weight.grad is not None}
    return loss.detach(), gradients, {name: values[-1] for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize("kind", ["full", "lora", "trained_tokens"])
def test_loss_gradients_and_rewards_equal_trls(task_trainers, kind):
    theirs = loss_gradients_rewards(*task_trainers("dpo_multi", kind))
    ours = loss_gradients_rewards(*task_trainers("dpo_single", kind))
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-5)
    assert ours[1].keys() == theirs[1].keys() and len(ours[1]) > 10
    for name, gradient in ours[1].items():
        torch.testing.assert_close(gradient, theirs[1][name], rtol=1e-5, atol=1e-5, msg=name)
    assert abs(ours[2]["rewards/margins"]) > 1e-3
    for name, value in ours[2].items():
        assert value == pytest.approx(theirs[2][name], abs=1e-4 if name.startswith("logps") else 1e-5), name


@pytest.mark.parametrize("kind", ADAPTERS)
def test_begins_at_ln_2_and_both_modes_go_the_same_way(dpo_steps, kind):
    logged = {mode: dpo_steps("--task_type", mode, *ADAPTERS[kind]) for mode in MODES}
    for steps in logged.values():
        assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert steps[0]["rewards/chosen"] == pytest.approx(0, abs=1e-6)
        assert steps[-1]["loss"] < steps[0]["loss"]
    for ours, theirs in zip(logged["dpo_single"], logged["dpo_multi"], strict=True):
        for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=2e-5), name


@pytest.mark.parametrize("kind", ["rslora", "dora", "pissa", "trained_tokens"])
def test_every_adapter_begins_as_the_base(dpo_steps, kind):
    flags = ["--max_steps", "1", "--per_device_train_batch_size", "8"]
    base = dpo_steps(*flags)[0]
    begun = dpo_steps(*flags, *ADAPTERS[kind])[0]
    for name in ("logps/chosen", "logps/rejected"):
        assert begun[name] == pytest.approx(base[name], abs=1e-4)


def test_dpo_single_pads_only_where_it_is_asked_to(task_trainers):
    trainer, rows = task_trainers("dpo_single", "lora")
    assert "position_ids" in trainer.data_collator(rows)
    trainer, rows = task_trainers("dpo_single", "lora", "--padding_free", "false")
    assert "attention_mask" in trainer.data_collator(rows)


@pytest.mark.parametrize("mode", MODES)
def test_one_step_lowers_the_loss(train_dpo, mode):
    flags = ["--task_type", mode, "--max_steps", "2", "--per_device_train_batch_size", "8", "--warmup_steps", "0"]
    _, steps = train_dpo(*flags)
    assert steps[1]["loss"] < steps[0]["loss"] - 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_precomputed_reference_has_the_same_losses(train_dpo, dpo_steps, mode):
    for kind in ("full", "lora"):
        flags = ["--task_type", mode, *ADAPTERS[kind]]
        kept = dpo_steps(*flags)
        for again in range(2):  # the second time from what TRL keeps beside the rows
            folder, before = train_dpo(*flags, "--precompute_ref_log_probs", "true", output=f"{kind}-before-{again}")
            assert [step["loss"] for step in before] == pytest.approx([step["loss"] for step in kept], abs=1e-5)
        assert "prepared rows found" in (folder / "train.log").read_text(encoding="utf-8")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sft", ["lora", "trained_tokens", "qlora"])
def test_precomputed_reference_under_an_sft_adapter(trained, train_dpo, mode, sft):
    tuned = trained("--learning_rate", "1e-2", *ADAPTERS[sft])
    flags = ["--task_type", mode, "--adapter_name_or_path", str(tuned), "--precompute_ref_log_probs", "true"]
    _, steps = train_dpo(*flags, *(["--train_mode", "qlora"] if sft == "qlora" else []))
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert steps[0]["rewards/chosen"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_each_pair_counts_once_in_the_evaluation_figures(train_dpo, pairs_file, mode):
    figures = {}
    for size in ("3", "8"):
        flags = ["--task_type", mode, "--eval_data_path", pairs_file, "--per_device_eval_batch_size", size]
        folder, _ = train_dpo(*flags, "--eval_steps", "1", "--max_steps", "2", output=f"run-{size}")
        history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        figures[size] = [entry for entry in history if "eval_loss" in entry][-1]
    for name in ("rewards/accuracies", "rewards/margins", "rewards/chosen", "logps/rejected"):
        assert figures["3"][f"eval_{name}"] == pytest.approx(figures["8"][f"eval_{name}"], rel=1e-4), name


def test_a_kept_reference_that_is_cut_off_is_made_again(train_dpo, tmp_path):
    flags = ["--precompute_ref_log_probs", "true", "--cache_dir", str(tmp_path / "cache")]
    _, first = train_dpo(*flags, output="first")
    (kept,) = (tmp_path / "cache").rglob("cache-*.arrow")
    kept.write_bytes(kept.read_bytes()[:100])
    _, again = train_dpo(*flags, output="again")
    assert [step["loss"] for step in again] == [step["loss"] for step in first]


def test_precomputed_reference_is_not_taken_from_a_run_of_another_precision(train_dpo, tmp_path):
    """Trained in full the weights are float32's in both, and the arithmetic is not."""
    flags = ["--precompute_ref_log_probs", "true", "--cache_dir", str(tmp_path / "cache"), *ADAPTERS["full"]]
    for number, precision in enumerate(["bf16", "fp32"], 1):
        _, steps = train_dpo(*flags, "--precision", precision, output=precision)
        assert len(list((tmp_path / "cache").rglob("cache-*.arrow"))) == number
    assert steps[0]["rewards/chosen"] == pytest.approx(0, abs=1e-6)  # the reference is float32's own


def test_precomputed_reference_is_not_taken_from_a_run_with_other_lengths_weighed(train_dpo, dpo_steps):
    for number, flags in enumerate([[], ["--ld_alpha", "0.2"]]):
        kept = dpo_steps("--task_type", "dpo_multi", *flags)
        _, before = train_dpo(*flags, "--precompute_ref_log_probs", "true", output=f"before-{number}")
        assert [step["loss"] for step in before] == pytest.approx([step["loss"] for step in kept], abs=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sft", ["lora", "dora", "trained_tokens", "qlora", "pissa"])
def test_an_sft_adapter_is_start_and_reference(trained, train_dpo, mode, sft, tiny_models):
    tuned = trained("--precision", "fp32", *ADAPTERS[sft])
    before = load_file(tuned / "adapter_model.safetensors")
    flags = ["--task_type", mode, "--adapter_name_or_path", str(tuned)]
    flags += ["--train_mode", "qlora"] if sft == "qlora" else []
    folder, steps = train_dpo(*flags, "--save_strategy", "epoch")
    assert steps[0]["rewards/chosen"] == steps[0]["rewards/rejected"] == 0
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert steps[-1]["rewards/margins"] > 0
    after = load_file(folder / "adapter_model.safetensors")
    assert after.keys() == before.keys()
    assert all(not torch.equal(after[name], before[name]) for name in before)
    assert not list(folder.rglob("ref"))  # the reference is not saved a second time
    config = json.loads((folder / "train_args.json").read_text(encoding="utf-8"))["common"]
    assert config["model_name_or_path"] == tiny_models()


def test_reference_under_an_sft_adapter_is_the_tuned_model(trained, train_dpo, tiny_models):
    """The first logged log-probabilities are those of the SFT run, loaded by plain PEFT."""
    from peft import PeftModel

    from utils.data.pairs import to_pair
    from utils.data.truncate import encode_pairs_within
    from utils.model.tokenizer import load_tokenizer
    from utils.template import get_template

    tuned = trained("--precision", "fp32", "--learning_rate", "1e-2")
    flags = ["--adapter_name_or_path", str(tuned), "--per_device_train_batch_size", "8", "--max_steps", "1"]
    _, steps = train_dpo(*flags)
    base = AutoModelForCausalLM.from_pretrained(tiny_models(), dtype=torch.float32)
    pairs = [to_pair(row) for row in tiny.PAIRS]
    tokenizer = load_tokenizer(tiny_models())
    rows = encode_pairs_within(pairs, get_template("qwen"), tokenizer, 1024, 512)
    batch = build_pair_collator(0, True)(rows)
    with torch.no_grad():
        untuned = sequence_log_probs(base, batch)[0][: len(rows)].mean()
        expected = sequence_log_probs(PeftModel.from_pretrained(base, tuned), batch)[0][: len(rows)].mean()
    assert abs(expected - untuned) > 1
    assert steps[0]["logps/chosen"] == pytest.approx(expected.item(), abs=1e-3)


def test_full_training_from_an_sft_adapter_begins_at_the_tuned_model(trained, train_dpo):
    tuned = trained("--precision", "fp32")
    folder, steps = train_dpo("--adapter_name_or_path", str(tuned), "--train_mode", "full")
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and (folder / "model.safetensors").is_file()
    _, other = train_dpo("--adapter_name_or_path", str(tuned), output="adapter")
    assert steps[0]["logps/chosen"] == pytest.approx(other[0]["logps/chosen"], abs=1e-3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("start", ["base", "sft"])
def test_resume_ends_where_an_undisturbed_run_ends(trained, train_dpo, mode, start):
    flags = ["--task_type", mode, "--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "9"]
    if start == "sft":
        tuned = trained("--precision", "fp32")
        flags += ["--adapter_name_or_path", str(tuned)]
    whole, _ = train_dpo(*flags, output="whole")
    checkpoint = sorted(whole.glob("checkpoint-*"))[1]
    resumed, _ = train_dpo(*flags, "--resume_from_checkpoint", str(checkpoint), output="resumed")
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (whole, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def height_of(picture):
    return int.from_bytes(picture.read_bytes()[20:24], "big")


def test_the_picture_has_a_panel_for_margins_and_one_for_accuracy(rendered, train, train_dpo, rows_file):
    sft, dpo = train(data=rows_file, output="sft"), train_dpo(output="dpo")[0]
    # two panels of 2 inches more, at 150 dots an inch
    assert height_of(dpo / "loss.png") - height_of(sft / "loss.png") == 600


def test_evaluation_best_checkpoint_and_the_files_it_leaves(train_dpo, pairs_file):
    flags = ["--eval_data_path", pairs_file, "--load_best_model_at_end", "true", "--save_strategy", "steps"]
    folder, _ = train_dpo(*flags, "--save_steps", "0.5", "--eval_steps", "0.5")
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    assert [entry for entry in history if "eval_rewards/accuracies" in entry]
    left = {path.name for path in folder.iterdir() if not path.name.startswith("checkpoint-")}
    assert left == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja",
        "generation_config.json", "loss.png", "tokenizer.json", "tokenizer_config.json", "train.log", "train_args.json",
        "trainer_state.json",
    }  # fmt: skip


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_of_trl_runs(train_dpo, loss_type):
    smoothing = ["--label_smoothing", "0.001"] if loss_type == "exo_pair" else []
    _, steps = train_dpo("--loss_type", loss_type, *smoothing, "--max_steps", "2")
    assert all(math.isfinite(step["loss"]) for step in steps)


def test_the_table_of_losses_is_trls():
    """TRL's own message names every loss it has."""
    import inspect
    import re

    from trl import DPOTrainer

    source = inspect.getsource(DPOTrainer._compute_loss)
    assert set(re.findall(r'loss_type == "(\w+)"', source)) == set(LOSS_TYPES)
