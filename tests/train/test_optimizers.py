"""Optimizers beyond those of `--optim`: rates by layer, and Muon beside AdamW, against plain PyTorch."""

import copy

import pytest
import tiny
import torch
from parsing import problems_of
from transformers import AutoModelForCausalLM

from utils.runtime.errors import UserError
from utils.train.optimizers import MuonWithAdamW, parameter_groups, split_groups


def model_of(architecture="qwen2", **changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny.config_for(architecture, 64, **changes)).float()


def rates_of(model, groups):
    rates = {id(weight): group["lr"] for group in groups for weight in group["params"]}
    return {name: rates[id(weight)] for name, weight in model.named_parameters() if id(weight) in rates}


@pytest.mark.parametrize(("architecture", "tied"), [("qwen2", True), ("llama", False), ("gpt2", True)])
def test_each_layer_has_the_next_ones_rate_times_the_decay(architecture, tied):
    model = model_of(architecture, tie_word_embeddings=tied)
    names = [name for name, _ in model.named_parameters()]
    rates = rates_of(model, parameter_groups(model, 1e-3, 0.1, set(names), 0.5, False))
    assert set(rates) == set(names)
    for name, rate in rates.items():
        if ".0." in name:
            distance = 2  # of two layers
        elif ".1." in name:
            distance = 1
        else:
            distance = 3 if "embed_tokens" in name or "wte" in name or "wpe" in name else 0
        assert rate == pytest.approx(1e-3 * 0.5**distance), name


def test_weight_decay_is_kept_and_the_first_group_has_the_highest_rate():
    model = model_of(tie_word_embeddings=False)
    decayed = {name for name, _ in model.named_parameters() if "norm" not in name and "bias" not in name}
    groups = parameter_groups(model, 1e-3, 0.1, decayed, 0.9, True)
    decays = {id(weight): group["weight_decay"] for group in groups for weight in group["params"]}
    for name, weight in model.named_parameters():
        assert decays[id(weight)] == (0.1 if name in decayed else 0.0), name
    assert groups[0]["lr"] == max(group["lr"] for group in groups) == 1e-3


def test_a_model_whose_layers_are_not_found_is_refused():
    model = model_of()
    model.config.num_hidden_layers = 7
    with pytest.raises(UserError, match="--layerwise_lr_decay: the 7 layers of Qwen2ForCausalLM are not found"):
        parameter_groups(model, 1e-3, 0.1, set(), 0.9, False)


def steps(model, optimizers, count=3):
    ids = torch.arange(24).reshape(2, 12)
    for _ in range(count):
        model(input_ids=ids, labels=ids).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def muon_of(model, rate=1e-2):
    names = {name for name, weight in model.named_parameters() if weight.ndim > 1}
    groups = parameter_groups(model, rate, 0.1, names, None, True)
    return MuonWithAdamW(*split_groups(groups), betas=(0.9, 0.95), eps=1e-8)


@pytest.mark.parametrize("tied", [True, False])
def test_muon_steps_as_torchs_muon_and_adamw(tied):
    """Matrices of the layers as torch.optim.Muon trains them, the rest as torch.optim.AdamW."""
    ours = model_of(tie_word_embeddings=tied)
    theirs = copy.deepcopy(ours)
    matrices = [weight for name, weight in theirs.named_parameters() if "_proj.weight" in name]
    known = {id(weight) for weight in matrices}
    others = [weight for weight in theirs.parameters() if id(weight) not in known]
    assert len(matrices) == 14
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
    adamw = torch.optim.AdamW([
        {"params": [weight for weight in others if weight.ndim > 1], "weight_decay": 0.1},
        {"params": [weight for weight in others if weight.ndim == 1], "weight_decay": 0.0},
    ], **options)  # fmt: skip
    muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    steps(ours, [muon_of(ours)])
    steps(theirs, [muon, adamw])
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_muon_goes_on_from_its_state_and_follows_a_schedule():
    whole, resumed = model_of(), model_of()
    optimizer = muon_of(whole)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    steps(whole, [optimizer])
    schedule.step()
    assert {group["lr"] for group in optimizer.param_groups} == {5e-3}
    resumed.load_state_dict(whole.state_dict())
    again = muon_of(resumed)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert {group["lr"] for group in again._muon.param_groups} == {5e-3}
    steps(whole, [optimizer])
    steps(resumed, [again])
    for (name, one), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize(("flags", "said"), [
    (["--use_muon", "true"], "--use_muon true orthogonalises the updates of whole weight matrices"),
    (["--use_muon", "true", "--train_mode", "full", "--optim", "sgd"], "with AdamW, and --optim sgd is given"),
    (["--use_muon", "true", "--train_mode", "full", "--deepspeed", "zero2"], "which --deepspeed flattens or divides"),
    (["--layerwise_lr_decay", "1.5"], "--layerwise_lr_decay 1.5 is not allowed; give a number above 0 and at most 1"),
    (["--layerwise_lr_decay", "0.9", "--loraplus_lr_ratio", "4"], "both set the learning rates"),
])  # fmt: skip
def test_what_cannot_be_combined_is_refused(parse, flags, said):
    assert any(said in problem for problem in problems_of(parse, *flags))


def test_a_run_with_muon_and_rates_by_layer_goes_on_exactly(train, tmp_path):
    """Interrupted after a step and continued, it ends with the weights of an uninterrupted run."""
    from safetensors.torch import load_file

    flags = ["--train_mode", "full", "--use_muon", "true", "--layerwise_lr_decay", "0.8", "--save_steps", "2",
             "--save_strategy", "steps", "--learning_rate", "1e-3"]  # fmt: skip
    whole = train(*flags, "--max_steps", "4", output=tmp_path / "whole")
    again = train(*flags, "--max_steps", "4", "--resume_from_checkpoint", str(whole / "checkpoint-2"),
                  output=tmp_path / "again")  # fmt: skip
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_memory_plan_counts_one_state_for_a_matrix(parse):
    from utils.memory.layout import muon_states, optimizer_states

    _, train_args = parse("--train_mode", "full", "--use_muon", "true")
    model = model_of(tie_word_embeddings=True)
    matrices = sum(weight.numel() for name, weight in model.named_parameters() if "_proj.weight" in name)
    adamw = optimizer_states(train_args, list(model.parameters()))
    assert muon_states(None, train_args, model) == pytest.approx(adamw - 4 * matrices, abs=4 * 40)


@pytest.mark.parametrize("name", ["galore_adamw", "apollo_adamw"])
def test_updates_of_low_rank_by_name(parse, monkeypatch, name):
    """Without their package they are refused before the model is loaded; with it they need layers, and no adapter."""
    from importlib.util import find_spec

    problems = problems_of(parse, "--optim", name)
    package = {"galore_adamw": "galore_torch", "apollo_adamw": "apollo_torch"}[name]
    if find_spec(package) is None:
        assert any(f"--optim {name} cannot be used" in problem and "install" in problem for problem in problems)
    assert any("projects the gradients of whole weight matrices" in problem for problem in problems)
    assert any("needs --optim_target_modules" in problem for problem in problems)


@pytest.mark.parametrize(("name", "package"), [("galore_adamw", "galore_torch"), ("apollo_adamw", "apollo_torch")])
def test_a_run_with_updates_of_low_rank(train, name, package):
    pytest.importorskip(package)
    folder = train("--train_mode", "full", "--optim", name, "--optim_target_modules", "all-linear", "--max_steps", "2",
                   "--optim_args", "rank=4, update_proj_gap=1, scale=1")  # fmt: skip
    assert (folder / "model.safetensors").is_file()


@pytest.mark.parametrize(("trained", "said"), [
    (r"down_proj", "no other weight is trained"), ("norm", "no weight matrix of a layer is trained"),
])  # fmt: skip
def test_muon_with_nothing_for_one_of_the_two_is_refused(train, trained, said):
    with pytest.raises(UserError, match=said):
        train("--train_mode", "full", "--use_muon", "true", "--trainable_modules", trained, "--max_steps", "1")


def test_the_options_of_an_optimizer_are_made_once(train, monkeypatch):
    """Making those of GaLore by layer hooks an optimizer to each weight, which needs to be there once."""
    from transformers import Trainer

    calls, own = [], Trainer.get_optimizer_cls_and_kwargs

    def noted(args, model=None):
        calls.append(model is not None)
        return own(args, model)

    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(noted))
    train("--max_steps", "1")
    assert calls.count(True) == 1
