"""The optimizer groups of the notebook against PEFT's, its Adam against PyTorch's, and the exponents it measures."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from llm_tricks.notebook import definitions

nb = definitions("lora_plus")
# what is trained: biases, vectors, embeddings, whole modules, and names that only look like B's
OPTIONS = [
    {},
    {"bias": "all"},
    {"bias": "lora_only", "use_dora": True},
    {"target_modules": ["embed_tokens", "q_proj"]},
    {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    {"modules_to_save": ["norm", "lm_head"]},
    {"trainable_token_indices": [1, 2]},
]


def language_model(**options):
    """A small Qwen2 with an adapter, the same each time."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    options = {"target_modules": ["q_proj", "down_proj"]} | options
    model = get_peft_model(Qwen2ForCausalLM(config), LoraConfig(r=2, **options))
    for weight in model.parameters():  # B is zero at the start, and hides what happens to A
        if weight.requires_grad:
            nn.init.normal_(weight)
    return model


def with_layer_norm():
    """The notebook's own model, whose norm is a LayerNorm."""
    model = nb.with_adapter(bias="all", use_dora=True)
    for weight in model.parameters():
        if weight.requires_grad:
            nn.init.normal_(weight)
    return model


def settings_of(model, optimizer) -> dict:
    """Each trained weight's name → its rate and its decay."""
    found = {
        id(weight): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for weight in group["params"]
    }
    return {name: found[id(weight)] for name, weight in model.named_parameters() if weight.requires_grad}


def one_step(model, optimizer):
    output = model(torch.arange(10)[None])
    logits = output[0] if isinstance(output, torch.Tensor) else output.logits[0]
    F.cross_entropy(logits, torch.arange(10) % 3).backward()
    optimizer.step()
    return model.state_dict()


MODELS = [*(lambda options=options: language_model(**options) for options in OPTIONS), with_layer_norm]


@pytest.mark.parametrize("make", MODELS, ids=[*map(str, OPTIONS), "LayerNorm"])
@pytest.mark.parametrize("embedding_lr", [1e-6, 5e-3])
def test_groups_and_a_step_are_pefts(make, embedding_lr):
    ours, theirs = make(), make()
    before = copy.deepcopy(ours.state_dict())
    groups = nb.loraplus_groups(ours, lr=1e-2, ratio=16, weight_decay=0.1, embedding_lr=embedding_lr)
    mine = torch.optim.AdamW(list(groups.values()))
    other = create_loraplus_optimizer(
        theirs,
        torch.optim.AdamW,
        lr=1e-2,
        loraplus_lr_ratio=16,
        loraplus_weight_decay=0.1,
        loraplus_lr_embedding=embedding_lr,
    )
    assert settings_of(ours, mine) == settings_of(theirs, other)
    sizes = [[len(group["params"]) for group in optimizer.param_groups] for optimizer in (mine, other)]
    assert sizes[0] == sizes[1], "the same order of groups"
    after, expected = one_step(ours, mine), one_step(theirs, other)
    assert any(not torch.equal(after[name], before[name]) for name in after)
    for name in after:
        torch.testing.assert_close(after[name], expected[name], rtol=0, atol=0)


def test_no_decay_and_pefts_rate_for_embeddings_are_the_defaults():
    model = language_model(target_modules=["embed_tokens", "q_proj"])
    mine = torch.optim.AdamW(list(nb.loraplus_groups(model, lr=1e-3, ratio=4).values()))
    other = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4)
    assert settings_of(model, mine) == settings_of(model, other)
    assert {rate for rate, _ in settings_of(model, mine).values()} == {1e-3, 4e-3, 1e-6}


def test_adam_is_pytorchs_with_a_rate_for_each_run():
    torch.manual_seed(0)
    start, rates = torch.randn(3, 4, 5), torch.tensor([0.1, 0.01, 1.0])
    ours = start.clone()
    theirs = [weight.clone().requires_grad_() for weight in start]
    adam = nb.Adam([ours], [rates[:, None, None]])
    others = [torch.optim.Adam([weight], lr=rate.item()) for weight, rate in zip(theirs, rates, strict=True)]
    for _ in range(7):
        gradient, before = torch.randn(3, 4, 5), ours.clone()
        moves = adam.step([gradient])
        torch.testing.assert_close(ours - before, moves[0], rtol=1e-4, atol=1e-5)
        for weight, other, g in zip(theirs, others, gradient, strict=True):
            weight.grad = g
            other.step()
    torch.testing.assert_close(ours, torch.stack(theirs).detach(), rtol=1e-5, atol=1e-5)


def test_the_parts_add_up_to_the_change_of_the_output():
    torch.manual_seed(0)
    x, A, B, move_a, move_b = (torch.randn(*shape).double() for shape in ((7, 9), (2, 9), (5, 2), (2, 9), (5, 2)))
    change = x @ ((B + move_b) @ (A + move_a) - B @ A).T
    torch.testing.assert_close(sum(nb.parts(x, A, B, move_a, move_b)), change)
    torch.testing.assert_close(nb.parts(x, A, B, move_a, 0 * move_b)[0], x @ (B @ move_a).T)


def test_a_run_of_the_grid_is_a_lora_layer_trained_alone():
    """Three pairs of rates at once against one model of PyTorch's layers at a time."""
    rates_a, rates_b = torch.tensor([0.1, 0.01, 0.02]), torch.tensor([0.1, 0.2, 0.01])
    training, held_out, z = nb.train_grid(32, rates_a, rates_b, steps=5, seed=3)
    x, h, v, y = nb.task(32, 3)
    part, rest = slice(nb.POINTS), slice(nb.POINTS, None)

    def share(part, *adapter):
        """The loss on a part of the points, over the loss there without adapter."""
        change = F.linear(F.linear(x[part], adapter[0]), adapter[1]) if adapter else 0
        base = (F.relu(h) @ v - y)[part].pow(2).mean()
        return (F.relu(h[part] + change) @ v - y[part]).pow(2).mean() / base

    for i in range(3):
        A, B = (weight[0].detach().clone().requires_grad_() for weight in nb.fresh(32, 3))
        optimizer = torch.optim.Adam(
            [{"params": [A], "lr": rates_a[i].item()}, {"params": [B], "lr": rates_b[i].item()}]
        )
        for step in range(6):
            loss = share(part, A, B)
            if step < 5:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        torch.testing.assert_close(training[i], loss.detach(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(held_out[i], share(rest, A, B).detach(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(z[i], (x[part] @ A.detach().T).abs().mean(), rtol=1e-3, atol=1e-4)
    assert held_out.shape == (3,)


@pytest.mark.parametrize("a", [0, -0.5, -1])
@pytest.mark.parametrize("b", [0, -0.5, -1])
def test_measured_slopes_are_near_the_predicted_exponents(a, b):
    found, said = nb.over_widths(a, b), nb.predicted(a, b)
    for name in said:
        # where A x grows, its start still counts at the small widths
        assert nb.slope(found[name]) == pytest.approx(said[name], abs=0.3), name
    stays = all(value == 0 for value in said.values())
    assert stays == ((a, b) == (-1, 0))


def test_a_lora_layer_is_pefts():
    torch.manual_seed(0)
    base, x = nn.Linear(12, 6), torch.randn(4, 12)
    ours = nb.LoRALinear(base, rank=3, scale=2.0)
    assert torch.equal(ours(x), base(x))
    nn.init.normal_(ours.B)
    model = get_peft_model(nn.Sequential(copy.deepcopy(base)), LoraConfig(r=3, lora_alpha=6, target_modules=["0"]))
    part = model.base_model.model[0]
    with torch.no_grad():
        part.lora_A["default"].weight.copy_(ours.A)
        part.lora_B["default"].weight.copy_(ours.B)
    torch.testing.assert_close(ours(x), model(x))


def test_a_ratio_is_a_larger_alpha_in_pefts_layers():
    """The whole of section 8 once more, with PEFT's model and optimizer in place of the notebook's."""
    x, y = torch.randn(2, 32, 12, generator=torch.Generator().manual_seed(1))

    def trained(alpha, ratio):
        torch.manual_seed(0)
        model = get_peft_model(
            nn.Sequential(nn.Linear(12, 12)), LoraConfig(r=3, lora_alpha=alpha, target_modules=["0"])
        )
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=ratio, eps=1e-12)
        for _ in range(20):
            optimizer.zero_grad()
            (model(x) - y).pow(2).mean().backward()
            optimizer.step()
        return model.base_model.model[0].get_delta_weight("default").detach()

    plus, alpha, plain = trained(3, 8), trained(24, 1), trained(3, 1)
    torch.testing.assert_close(plus, alpha, rtol=1e-3, atol=1e-6)
    assert (plus - plain).abs().mean() > plain.abs().mean()


def test_the_digits_are_trained_at_two_rates_and_learned():
    torch.manual_seed(0)
    base = nb.network(32)
    frozen = copy.deepcopy(base.state_dict())
    model = nb.adapt(base)
    groups = nb.two_rates(model, 0.01, 0.04)
    assert [group["lr"] for group in groups] == [0.01, 0.04]
    assert [tuple(weight.shape) for weight in groups[0]["params"]] == [(4, 64), (4, 32), (4, 32)]
    assert {id(w) for group in groups for w in group["params"]} == {
        id(w) for w in model.parameters() if w.requires_grad
    }
    nb.train(model, groups, *nb.digits(True, nb.TUNE_PART), steps=60)
    assert nb.accuracy(model, *nb.digits(True, nb.TEST_PART)) > 0.5
    assert all(torch.equal(frozen[name], weight) for name, weight in base.state_dict().items())
    parts = [nb.BASE_PART, nb.TUNE_PART, nb.CHOOSE_PART, nb.TEST_PART]
    assert [len(nb.digits(False, part)[1]) for part in parts] == [600, 200, 100, 897]
