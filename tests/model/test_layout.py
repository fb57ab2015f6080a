"""The layout that a run chooses for its batches, and its loss, which is that of rows one by one."""

import dataclasses
import json

import pytest
import tiny
import torch
from small_models import SWITCHES, small
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import utils.model.layout
import utils.model.probe
from utils.model.layout import choose_layout
from utils.model.probe import Probe
from utils.runtime.errors import UserError
from utils.tasks import get_task


class Args:
    model_name_or_path, task_type, max_len = "base", "sft", 1024
    padding_free, packing, per_device_train_batch_size, per_device_eval_batch_size = True, False, 8, 8

    def __init__(self, **changes):
        vars(self).update(changes)

    @property
    def task(self):
        return get_task(self.task_type)


@pytest.mark.parametrize(
    ("changes", "found", "eager", "expected"),
    [
        ({}, Probe(), False, (None, True)),
        ({}, Probe(end_to_end="leaks"), False, (None, False)),
        ({}, Probe(), True, (None, False)),
        ({"per_device_train_batch_size": 1}, Probe(), True, (None, True)),
        ({"packing": True}, Probe(), True, (None, True)),
        ({"packing": True}, Probe(end_to_end="leaks"), False, ("--packing true", False)),
        ({}, Probe(padded="differs", end_to_end="leaks"), False, ("--per_device_train_batch_size 1", False)),
        ({}, Probe(padded="differs"), False, (None, True)),
        ({}, Probe(padded="differs"), True, (None, True)),
        ({"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1},
         Probe(padded="differs", end_to_end="leaks"), False, (None, False)),
        ({"task_type": "dpo_multi"}, Probe(padded="differs"), False, ("another model", False)),
        ({}, Probe(not_causal="sees"), False, ("another model", False)),
        ({}, Probe(end_to_end="chooses", longest=512), False, ("--max_len 512", False)),
        ({}, Probe(end_to_end="chooses", longest=2048), False, (None, False)),
    ],
)  # fmt: skip
def test_the_chosen_layout(changes, found, eager, expected):
    args = Args(**changes)
    problem, padding_free, _ = choose_layout(args, args, args.task, found, eager)
    assert (expected[0] in problem) if expected[0] else problem is None
    assert padding_free == expected[1]


def test_a_small_model_is_of_the_task_s_class(tokenizer, monkeypatch):
    """Where the weights are sharded, and before there are any."""
    built = []

    def note(config, sizes=None, **options):
        built.append(options.pop("auto_class"))  # and none is built, so that nothing is probed

    task = dataclasses.replace(get_task("sft"), auto_class="AutoModelForTokenClassification")
    args = Args(
        trust_remote_code=False, attn_implementation="auto", deepspeed_plugin=None, fsdp=None, rope_scaling=None
    )
    monkeypatch.setattr(utils.model.probe, "small_model", note)
    monkeypatch.setattr(utils.model.probe, "is_whole", lambda model: False)
    assert utils.model.layout.probe_for_task(args, args, task, small("qwen2"), tokenizer).small
    monkeypatch.setattr(utils.model.layout, "small_model", note)
    monkeypatch.setattr(utils.model.layout, "load_scaled_config", lambda *_: None)
    assert utils.model.layout.expected_layout(args, args, task, tokenizer).padding_free
    assert built == ["AutoModelForTokenClassification"] * 2


def one_by_one(folder, rows):
    """Loss of the first step by plain transformers: rows alone, each trained token once."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total, count = 0.0, 0
    for row in rows:
        labels = torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
    return total / count


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """kind → the folder of a small random model with a tokenizer."""
    from utils.model.small import small_config

    folders = {}

    def folder_of(kind):
        if kind not in folders:
            folder, tokenizer = tmp_path_factory.mktemp(kind), tiny.byte_level_tokenizer()
            config = CONFIG_MAPPING[kind](**SWITCHES.get(kind, {}))
            config = small_config(config, vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=0, eos_token_id=0)
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config)
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.data.normal_(std=weight.shape[-1] ** -0.5)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            folders[kind] = str(folder)
        return folders[kind]

    return folder_of


@pytest.mark.parametrize("kind", ["gpt_oss", "falcon", "mamba", "lfm2", "modernbert-decoder", "recurrent_gemma"])
def test_the_loss_of_a_run_equals_that_of_rows_one_by_one(kind, saved, train, rows_file):
    from utils.template import get_template

    flags = ["--train_mode", "full", "--precision", "fp32", "--max_steps", "1", "--logging_steps", "1"]
    flags += ["--router_aux_loss_coef", "0"] if kind == "gpt_oss" else []  # it would count in the loss
    folder = train(*flags, "--per_device_train_batch_size", "8", model=saved(kind))
    template = get_template("qwen", tiny.byte_level_tokenizer())
    from utils.data.conversations import to_messages

    rows = [template.encode(to_messages(row), tiny.byte_level_tokenizer()) for row in tiny.ROWS]
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert history[0]["loss"] == pytest.approx(one_by_one(saved(kind), rows), rel=1e-4)
    assert json.loads((folder / "train_args.json").read_text())["trainer"]["padding_free"] is (
        kind == "modernbert-decoder"
    )


def test_packing_is_refused_where_rows_see_each_other(saved, train):
    with pytest.raises(UserError, match="--packing true"):
        train("--packing", "true", model=saved("gpt_oss"))
