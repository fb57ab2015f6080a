"""Which layouts a model computes correctly, found on the model, and what a run makes of it."""

import json

import pytest
import tiny
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from utils.data.collate import build_collator, build_pair_collator
from utils.data.row_types import CONVERSATION, PAIR
from utils.model.layout import choose_layout
from utils.model.probe import NOT_INPUTS, Probe, example_rows, probe
from utils.model.small import small_model
from utils.runtime.errors import UserError
from utils.tasks import get_task

LAYOUTS = {"padded": build_collator(0, False), "end_to_end": build_collator(0, True)}
# heed positions; ignore them; carry a state; raise for want of a kernel; see what comes
RIGHT = ("qwen2", "llama", "gemma2", "gemma3_text", "phi3", "mistral", "cohere", "mixtral")
LEAKS = ("gpt_oss", "opt", "falcon", "bloom", "mamba", "rwkv", "jamba")
RAISES = ("lfm2", "bamba", "qwen3_next")


# what a default configuration does not have
SWITCHES = {"lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}}


def small(kind):
    return small_model(CONFIG_MAPPING[kind](**SWITCHES.get(kind, {})))


@pytest.mark.parametrize("kind", RIGHT)
def test_end_to_end_is_right(kind, tokenizer):
    found = probe(small(kind), LAYOUTS, example_rows(tokenizer, CONVERSATION))
    assert (found.fails, found.not_causal, found.padded, found.end_to_end) == (None,) * 4
    assert found.differences["end_to_end"] < 1e-5


@pytest.mark.parametrize("kind", LEAKS + RAISES)
def test_end_to_end_is_wrong(kind, tokenizer):
    found = probe(small(kind), LAYOUTS, example_rows(tokenizer, CONVERSATION))
    assert found.padded is None
    assert ("see each other" if kind in LEAKS else "cannot compute") in found.end_to_end


def test_a_model_that_sees_what_comes_is_refused(tokenizer):
    assert "not causal" in probe(small("bert"), LAYOUTS, example_rows(tokenizer, CONVERSATION)).not_causal


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("jitter", ["known", "unknown"])
def test_a_router_that_draws_its_experts_is_no_leak(seed, jitter, tokenizer, monkeypatch):
    """Phi-3.5-MoE draws experts in training mode, often the same ones twice: no verdict may depend on the seed."""
    if jitter == "unknown":  # under a name that is not set to 0
        monkeypatch.setattr("utils.model.probe_state._RATES", ())
    model = small("phimoe")
    torch.manual_seed(seed)
    found = probe(model, LAYOUTS, example_rows(tokenizer, CONVERSATION))
    assert (found.fails, found.not_causal, found.padded, found.end_to_end) == (None,) * 4
    assert [layer.mlp.router.router_jitter_noise for layer in model.model.layers] == [0.01, 0.01]  # put back


@pytest.mark.parametrize("kind", ["gpt_oss", "mamba", "qwen2"])
def test_pairs_are_laid_out_by_their_own_collator(kind, tokenizer):
    layouts = {"padded": build_pair_collator(0, False), "end_to_end": build_pair_collator(0, True)}
    found = probe(small(kind), layouts, example_rows(tokenizer, PAIR))
    assert found.padded is None
    assert (found.end_to_end is None) == (kind == "qwen2")


def test_a_small_leak_is_seen_in_bf16(tokenizer, monkeypatch):
    """Weights too many for float32: what 16 bits would hide shows where other tokens of another row change anything."""
    monkeypatch.setattr("utils.model.probe_state.FLOAT32_UP_TO", 0)
    model = small("falcon")
    for name, weight in model.named_parameters():
        if name.endswith("self_attention.dense.weight"):
            weight.data.mul_(0.01)  # attention adds little, and so does what leaks through it
    rows = example_rows(tokenizer, CONVERSATION)
    batch = {name: value for name, value in LAYOUTS["end_to_end"](rows).items() if name not in NOT_INPUTS}
    with torch.no_grad():
        found = model(**batch, use_cache=False).logits[0, 9:23]
        alone = model(input_ids=batch["input_ids"][:, 9:23], use_cache=False).logits[0]
    assert 1e-4 < (found - alone).abs().max() / alone.abs().max() < 0.02  # in float32; bf16 rounds off as much
    assert probe(model.bfloat16(), LAYOUTS, rows).end_to_end


def test_bf16_does_not_count_as_a_leak(tokenizer, monkeypatch):
    monkeypatch.setattr("utils.model.probe_state.FLOAT32_UP_TO", 0)
    for kind in ("qwen2", "mixtral"):
        found = probe(small(kind).bfloat16(), LAYOUTS, example_rows(tokenizer, CONVERSATION))
        assert (found.not_causal, found.padded, found.end_to_end) == (None,) * 3


def test_the_model_and_the_random_numbers_stay_as_they_were(tokenizer):
    model = AutoModelForCausalLM.from_config(
        tiny.config_for("mistral", 600, sliding_window=100, attention_dropout=0.1), dtype=torch.bfloat16
    )
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = torch.random.get_rng_state()
    probe(model, LAYOUTS, example_rows(tokenizer, CONVERSATION))
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, weight in model.state_dict().items():
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, before[name])
    assert model.config.sliding_window == 100
    assert {module.attention_dropout for module in model.modules() if hasattr(module, "attention_dropout")} == {0.1}


def test_windows_are_reached_by_short_rows(tokenizer):
    """A window that counted from the start of the step, not of the row, would show."""
    model = small("mistral")
    model.config.sliding_window = 4096
    seen = []
    forward = model.forward
    model.forward = lambda *args, **kwargs: seen.append(model.config.sliding_window) or forward(*args, **kwargs)
    probe(model, LAYOUTS, example_rows(tokenizer, CONVERSATION))
    assert set(seen) == {4096, 4} and model.config.sliding_window == 4096


@pytest.mark.parametrize("kind", ["axk2", "doge"])
def test_sparse_attention_chooses_among_the_rows_of_a_step(kind, tokenizer):
    """Its indexer takes the best of all tokens that are there, also of those it may not see."""
    model = small(kind)
    span = model.config.index_topk if kind == "axk2" else model.config.keep_window_size
    found = probe(model, LAYOUTS, example_rows(tokenizer, CONVERSATION))
    assert found.padded is None and found.not_causal is None
    assert f"where they are more than {span:,}" in found.end_to_end and found.longest == span


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
def test_what_is_chosen(changes, found, eager, expected):
    args = Args(**changes)
    problem, padding_free, _ = choose_layout(args, args, args.task, found, eager)
    assert (expected[0] in problem) if expected[0] else problem is None
    assert padding_free == expected[1]


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
def test_the_loss_of_a_run_is_that_of_rows_one_by_one(kind, saved, train, rows_file):
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


def test_packing_a_model_that_lets_rows_see_each_other_is_refused(saved, train):
    with pytest.raises(UserError, match="--packing true"):
        train("--packing", "true", model=saved("gpt_oss"))


def test_the_right_hand_side_of_not_inputs():
    """What a collator adds is no input of the model, and all else is."""
    batch = build_pair_collator(0, True)(example_rows(tiny.byte_level_tokenizer(), PAIR))
    assert set(batch) - NOT_INPUTS == {
        "input_ids", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["llama4_text", "inkling_text", "recurrent_gemma", "qwen2"])
def test_the_head_gives_the_log_probabilities_of_the_logits(kind):
    """Against log_softmax of the model's own logits, per token; and the gradient of their sum."""
    from trl.trainer.utils import add_fused_lm_head

    from utils.model.head import check_head, head_difference

    model = small(kind).eval()
    ids = torch.arange(5, 25)[None]
    expected = model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    expected.sum().backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    assert (head_difference(model) is None) == (kind == "qwen2")  # what TRL's head does by itself
    check_head(model)
    found = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    found.sum().backward()
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(weight.grad, gradients[name], rtol=1e-3, atol=1e-3, msg=name)


def test_a_small_model_leaves_the_random_numbers_alone():
    """It is built on every process of ZeRO-3, after the seed is set: other numbers would be another order of rows."""
    state = torch.random.get_rng_state()
    small("qwen2")
    assert torch.equal(torch.random.get_rng_state(), state)


def test_an_adapter_that_changes_the_model_at_its_start_is_refused():
    """Inkling normalises what its embedding looks up, which PEFT leaves out where it trains rows of it."""
    from peft import LoraConfig, get_peft_model

    from utils.model.adapter_start import check_new_adapter

    plain = LoraConfig(target_modules=["q_proj"])
    check_new_adapter(get_peft_model(small("qwen2"), plain))
    rounded = LoraConfig(target_modules=["q_proj"], use_dora=True)  # its magnitudes are rounded as the weights are
    check_new_adapter(get_peft_model(small("qwen2").bfloat16(), rounded))
    rows = LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5, 7, 14]})
    check_new_adapter(get_peft_model(small("gemma3_text"), rows))  # PEFT knows its scaled embedding
    model = get_peft_model(small("qwen2"), rows)
    embedding = model.get_base_model().model.embed_tokens.original_module
    embedding.forward = lambda ids: torch.nn.functional.normalize(
        torch.nn.functional.embedding(ids, embedding.weight), dim=-1
    )
    with pytest.raises(UserError, match="--train_special_tokens off"):
        check_new_adapter(model)
