"""Mixtures of experts: what is saved of them, and the auxiliary loss that keeps their experts evenly used."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from conftest import write_rows
from transformers import AutoConfig, AutoModelForCausalLM

import main_train
from utils.runtime.errors import UserError
from utils.script.infer import main as infer
from utils.script.merge_lora import main as merge_lora

QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
# families whose configuration has other names for what TRL's head reads, or lacks it
FOUR = {"num_local_experts": 4, "num_experts_per_tok": 2}
DPO = ["--train_args_path", "train_args/dpo/base.py"]


@pytest.fixture
def pairs_file(tmp_path):
    return write_rows(tmp_path / "pairs.jsonl", tiny.PAIRS)


def config_of(folder, name="config.json"):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def changed(before, after):
    return {key for key in {*before, *after} if before.get(key, "absent") != after.get(key, "absent")}


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("task", ["sft", "dpo_multi", "dpo_single"])
def test_the_saved_configuration_equals_the_bases(task, mode, train, tmp_path, rows_file, pairs_file):
    """Every field but the stop token, which is trained; of what `generate` does only stops and padding."""
    base = Path(tiny.save_tiny_model(tmp_path / "base", "qwen2_moe", pad_token_id=None, **QWEN))
    flags = [*DPO, "--task_type", task] if task != "sft" else []
    rows = rows_file if task == "sft" else pairs_file
    flags += ["--save_strategy", "steps", "--save_steps", "1", "--router_aux_loss_coef", "0.5"]
    folder = train("--max_steps", "1", "--precision", "fp32", "--train_mode", mode, *flags, model=str(base), data=rows)
    if mode == "lora":
        merge_lora(["--model_path", str(folder), "--output_dir", str(tmp_path / "merged")])
        folders = [tmp_path / "merged"]
    else:
        folders = [folder, folder / "checkpoint-1"]
    for saved in folders:
        assert changed(config_of(base), config_of(saved)) <= {"eos_token_id"}
        before, after = (config_of(at, "generation_config.json") for at in (base, saved))
        assert changed(before, after) <= {"eos_token_id", "pad_token_id"}
        model = AutoModelForCausalLM.from_pretrained(saved)
        ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, min_new_tokens=2)
        assert found.shape == (2, 5)


def test_the_cards_answers_for_several_prompts(train, tmp_path):
    base = tiny.save_tiny_model(tmp_path / "base", "qwen2_moe", **QWEN)
    folder = train("--max_steps", "1", "--train_mode", "full", "--card_samples", "3", model=base)
    assert "could not be made" not in (folder / "README.md").read_text(encoding="utf-8")
    assert "will show no answers" not in (folder / "train.log").read_text(encoding="utf-8")


def test_infer_and_merge_take_a_model_saved_with_router_logits(tmp_path, rows_file):
    """As weights trained elsewhere, or by earlier versions, are saved."""
    folder = tmp_path / "base"
    tokenizer = tiny.byte_level_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tiny.save_tiny_model(folder, "qwen2_moe", tokenizer, output_router_logits=True, **QWEN)
    out = tmp_path / "answers.jsonl"
    infer(["--model_path", str(folder), "--input", rows_file, "--output", str(out), "--max_new_tokens", "2"])
    assert len(out.read_text(encoding="utf-8").splitlines()) == len(tiny.ROWS)


def one_step(monkeypatch, train, base, rows, *flags):
    """Trains one step with plain gradient descent; returns the batches that the trainer was given, and its folder."""
    from utils.train.trainer import FaultTolerantTrainerMixin

    seen, step = [], FaultTolerantTrainerMixin.training_step

    def note(self, model, inputs, items=None):
        seen.append({name: value.clone() for name, value in inputs.items() if torch.is_tensor(value)})
        return step(self, model, inputs, items)

    monkeypatch.setattr(FaultTolerantTrainerMixin, "training_step", note)
    folder = train(
        "--max_steps", "1", "--precision", "fp32", "--train_mode", "full", "--optim", "sgd", "--learning_rate", "1",
        "--lr_scheduler_type", "constant", "--warmup_steps", "0", "--max_grad_norm", "0", "--padding_free", "false",
        "--weight_decay", "0", *flags, model=base, data=rows,
    )  # fmt: skip
    return seen, folder


@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "granitemoeshared", "gpt_oss", "qwen3_moe"])
def test_the_auxiliary_loss_equals_the_models_own(family, train, tmp_path, rows_file, monkeypatch):
    """After a step every weight has moved by the gradient of transformers' loss and its own auxiliary loss."""
    base = tiny.save_tiny_model(tmp_path / "base", family, **(QWEN if family == "qwen3_moe" else FOUR))
    (batch,), folder = one_step(monkeypatch, train, base, rows_file, "--router_aux_loss_coef", "3")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train()
    labels = batch.pop("labels")
    batch.pop("num_items_in_batch", None)
    output = model(**batch, output_router_logits=True, use_cache=False)
    loss = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    (loss + 3 * output.aux_loss).backward()
    trained = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())
    routers = 0
    for name, weight in model.named_parameters():
        torch.testing.assert_close(trained[name], weight - weight.grad, atol=2e-5, rtol=2e-4, msg=name)
        routers += ("router" in name or name.endswith("gate.weight")) and bool(weight.grad.abs().max() > 0)
    assert routers


@pytest.mark.parametrize("flags", [[], ["--router_aux_loss_coef", "0.1"]])
def test_a_mixture_without_an_auxiliary_loss_is_trained_without_or_refused(
    flags, tmp_path, rows_file, capsys, monkeypatch
):
    from utils.model.probe import Probe
    from utils.runtime.command import run_command

    # the experts of a tiny random Doge change with the length of a row, for which the probe would refuse it
    monkeypatch.setattr("utils.model.layout.probe_for_task", lambda *_: Probe())
    base = tiny.save_tiny_model(tmp_path / "base", "doge", num_experts=4, num_experts_per_tok=2, is_moe=True)
    argv = [
        "--model_name_or_path", base, "--train_data_path", rows_file, "--output_dir", str(tmp_path / "run"),
        "--max_steps", "1", "--report_to", "none", "--save_strategy", "no", *flags,
    ]  # fmt: skip
    if flags:
        with pytest.raises(SystemExit) as stop:
            run_command(lambda: main_train.main(argv))
        assert stop.value.code == 2
    else:
        main_train.main(argv)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert ("cannot be used with DogeForCausalLM" if flags else "auxiliary loss is not trained: ") in said


def test_label_smoothing_leaves_the_auxiliary_loss_out_with_a_warning(train, tmp_path, capsys):
    base = tiny.save_tiny_model(tmp_path / "base", "qwen2_moe", **QWEN)
    train("--max_steps", "1", "--label_smoothing_factor", "0.1", model=base)
    assert "auxiliary loss is not trained: TRL leaves it out" in capsys.readouterr().err


def test_a_base_whose_configuration_returns_router_logits(train, tmp_path):
    base = tmp_path / "base"
    tiny.save_tiny_model(base, "granitemoe", output_router_logits=True, **FOUR)
    folder = train("--max_steps", "1", "--train_mode", "full", "--router_aux_loss_coef", "0", model=str(base))
    assert changed(config_of(base), config_of(folder)) <= {"eos_token_id", "dtype"}
    assert AutoConfig.from_pretrained(folder).output_router_logits


def qlora_findings(folder):
    from utils.args import parse_args
    from utils.doctor.resources import quantised_findings

    run = ["--model_name_or_path", str(folder), "--train_mode", "qlora"]
    args, train_args = parse_args(run, needs_weights=False)
    args.precision = "bf16"
    return [finding.message for finding in quantised_findings(args, train_args)]


def test_weights_that_qlora_does_not_quantise_are_reported_with_numbers(tmp_path):
    """The published shape of Qwen3-30B-A3B: its experts are 48 × 128 × 3 × 2048 × 768 weights."""
    shape = {
        "vocab_size": 151_936, "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_experts": 128, "num_experts_per_tok": 8, "tie_word_embeddings": False,
    }  # fmt: skip
    AutoConfig.for_model("qwen3_moe", **shape).save_pretrained(tmp_path)
    experts, routers = 48 * 128 * 3 * 2048 * 768, 48 * 128 * 2048
    (said,) = qlora_findings(tmp_path)
    assert said.startswith(f"{experts + routers:,} of 30,532,122,624 weights are in no linear layer")
    assert "and stay in 16 bits, 58.0 GB: " in said
    assert "model.layers.*.mlp.experts.gate_up_proj, model.layers.*.mlp.experts.down_proj" in said


def test_the_reported_and_planned_qlora_weights_equal_those_in_memory(tmp_path):
    from transformers import BitsAndBytesConfig

    from utils.args import parse_args
    from utils.memory import estimate

    base = tiny.save_tiny_model(tmp_path / "base", "qwen2_moe", **QWEN)
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=options, dtype=torch.bfloat16)
    named = model.named_parameters()
    experts = [weight for name, weight in named if ".experts." in name or name.endswith("gate.weight")]
    left = [weight for weight in experts if weight.dtype == torch.bfloat16]
    (said,) = qlora_findings(base)
    assert said.startswith(f"{sum(weight.numel() for weight in left):,} of ")
    held = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    for state in [weight.quant_state for weight in model.parameters() if hasattr(weight, "quant_state")]:
        scales = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
        held += sum(scale.numel() * scale.element_size() for scale in scales)
    args, train_args = parse_args(["--model_name_or_path", base, "--train_mode", "qlora"])
    args.precision = "bf16"
    found = estimate(args, train_args, 1)
    assert found.parameters - found.gradients == held


def test_a_dense_model_has_no_such_finding(tiny_models):
    assert qlora_findings(tiny_models()) == []


def test_the_saved_configuration_has_the_trained_stop_token(train, tiny_models, tokenizer):
    """The one field in which it is not the base's: many programs stop by it, whatever generation_config.json says."""
    before = json.loads(Path(tiny_models(), "config.json").read_text())
    after = json.loads((train("--train_mode", "full", "--max_steps", "1") / "config.json").read_text())
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert before["eos_token_id"] == 0 and after["eos_token_id"] == stop != 0


@pytest.mark.parametrize(("own", "fused", "trained"), [(1.0, 1.01, True), (1.0, 1.5, False), (1.0, 0.5, False)])
def test_an_auxiliary_loss_that_differs_from_the_models_is_left_out_or_refused(own, fused, trained, monkeypatch):
    """As TRL's for a family whose experts it counts otherwise; to two per cent, since bf16 rounds both."""
    from utils.model import experts as balance

    config = SimpleNamespace(num_experts=4, num_experts_per_tok=2)
    config.get_text_config = lambda: config
    monkeypatch.setattr(balance, "_compute", lambda trainer, **options: (fused if options else own, None))

    def settled(coefficient):
        trainer = SimpleNamespace(
            model=SimpleNamespace(config=config), aux_loss_enabled=True, is_deepspeed_enabled=False,
            is_fsdp_enabled=False, args=SimpleNamespace(router_aux_loss_coef=coefficient),
        )  # fmt: skip
        balance.resolve_aux_loss(trainer)
        return trainer.aux_loss_enabled

    assert settled(0.0) == trained
    if not trained:
        with pytest.raises(UserError, match=f"TRL computes {fused:g} where the model itself computes 1"):
            settled(0.001)
