"""The mixture of experts of the notebook against transformers' Mixtral, and against a computation token by token."""

import pytest
import torch
from torch.nn import functional as F
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func

from llm_tricks.notebook import definitions

nb = definitions("moe")
SHAPES = [(4, 2, 8, 6, 0), (8, 2, 16, 12, 1), (8, 3, 12, 20, 2), (5, 5, 8, 4, 3)]  # experts, k, width, hidden, seed


def layer_and_input(experts, k, width, hidden, seed, **options):
    torch.manual_seed(seed)
    return nb.MoE(width, hidden, experts, k, **options), torch.randn(3, 7, width)


def outcome(forward, x, parameters):
    """Output, and the gradients of x and of the parameters for a random loss."""
    x = x.clone().requires_grad_()
    y = forward(x)
    target = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    return [y, *torch.autograd.grad((y * target).sum(), [x, *parameters])]


def assert_equal(ours, theirs):
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def token_by_token(layer, tokens, kept):
    """Each token alone, its experts one after another, with plain matrices."""
    rows = []
    for token, keep in zip(tokens, kept, strict=True):
        p = (layer.router.weight @ token).exp()
        p = p / p.sum()
        chosen = p.argsort(descending=True)[: layer.router.k]
        row, total = torch.zeros_like(token), p[chosen].sum() if layer.router.k > 1 else 1
        for number, works in zip(chosen.tolist(), keep.tolist(), strict=True):
            hidden = layer.experts.down.shape[-1]
            gate, up = (layer.experts.gate_up[number] @ token).split(hidden)
            row = row + works * p[number] / total * (layer.experts.down[number] @ (gate * gate.sigmoid() * up))
        rows.append(row)
    return torch.stack(rows)


def first_come(chosen, experts, capacity):
    """Which choices find room, by counting: all first choices in order, then all second ones."""
    taken, kept = [0] * experts, torch.zeros_like(chosen, dtype=torch.bool)
    for choice in range(chosen.shape[1]):
        for token in range(len(chosen)):
            number = chosen[token, choice].item()
            kept[token, choice] = taken[number] < capacity
            taken[number] += 1
    return kept


@pytest.mark.parametrize("experts, k, width, hidden, seed", SHAPES)
def test_output_and_gradients_are_mixtrals(experts, k, width, hidden, seed):
    layer, x = layer_and_input(experts, k, width, hidden, seed)
    config = MixtralConfig(
        hidden_size=width, intermediate_size=hidden, num_local_experts=experts, num_experts_per_tok=k
    )
    block = MixtralSparseMoeBlock(config)
    weights = [layer.router.weight, layer.experts.gate_up, layer.experts.down]
    theirs = [block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj]
    with torch.no_grad():
        for weight, other in zip(weights, theirs, strict=True):
            other.copy_(weight)
    assert_equal(outcome(layer, x, weights), outcome(block, x, theirs))


@pytest.mark.parametrize("factor", [None, 1.0, 0.5])
@pytest.mark.parametrize("experts, k, width, hidden, seed", [*SHAPES, (4, 1, 8, 6, 4)])
def test_sparse_is_dense_is_token_by_token(experts, k, width, hidden, seed, factor):
    layer, x = layer_and_input(experts, k, width, hidden, seed, factor=factor)
    weights, tokens = list(layer.parameters()), x.flatten(0, 1)
    sparse = outcome(lambda x: layer(x[None])[0], tokens, weights)
    kept = layer.kept
    assert (factor == 0.5) <= (~kept).any().item(), "half the room cannot hold every choice"
    assert_equal(sparse, outcome(lambda x: nb.dense_forward(layer.experts, x, layer.router(x), kept), tokens, weights))
    assert_equal(sparse, outcome(lambda x: token_by_token(layer, x, kept), tokens, weights))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [1, 2, 3])
def test_choices_are_dropped_where_the_room_is_used_up(k, seed):
    torch.manual_seed(seed)
    chosen = nb.route(torch.randn(30, 6) + torch.linspace(0, 2, 6), k).chosen
    for factor in (0.5, 1.0, 1.25, 6 / k):
        capacity = nb.capacity_of(30, 6, k, factor)
        kept = nb.within_capacity(chosen, 6, capacity)
        assert torch.equal(kept, first_come(chosen, 6, capacity))
    assert capacity == 30 and kept.all(), "with room for every token nothing is dropped"
    assert nb.capacity_of(100, 8, 2, 1.25) == 32  # 1.25 · 100 · 2 / 8 = 31.25, rounded up


def test_nothing_is_dropped_at_evaluation():
    layer, x = layer_and_input(4, 2, 8, 6, 0, factor=0.5)
    layer(x)
    assert not layer.kept.all()
    layer.eval()(x)
    assert layer.kept.all()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("experts, k", [(4, 1), (8, 2), (6, 3)])
def test_the_balancing_loss_is_transformers_divided_by_k(experts, k, seed):
    torch.manual_seed(seed)
    ours, theirs = (weight.requires_grad_() for weight in torch.randn(1, 40, experts).repeat(2, 1, 1))
    mine = nb.balancing_loss(nb.route(ours, k))
    other = load_balancing_loss_func((theirs,), num_experts=experts, top_k=k) / k
    torch.testing.assert_close(mine, other)
    torch.testing.assert_close(torch.autograd.grad(mine, ours), torch.autograd.grad(other, theirs))


def test_transformers_takes_all_layers_together():
    torch.manual_seed(0)
    layers = [nb.route(torch.randn(40, 6), 2) for _ in range(3)]
    together = nb.Routing(
        torch.cat([r.logits for r in layers]),
        torch.cat([r.weights for r in layers]),
        torch.cat([r.chosen for r in layers]),
    )
    pooled = load_balancing_loss_func(tuple(r.logits for r in layers), num_experts=6, top_k=2)
    torch.testing.assert_close(2 * nb.balancing_loss(together), pooled)
    apart = 2 * sum(nb.balancing_loss(r) for r in layers) / 3
    assert abs(apart - pooled) > 1e-3


def test_the_z_loss_is_the_mean_square_of_the_logarithm():
    torch.manual_seed(0)
    logits = torch.randn(7, 5)
    expected = sum(torch.log(sum(torch.exp(z) for z in row)) ** 2 for row in logits) / 7
    torch.testing.assert_close(nb.z_loss(nb.route(logits, 2)), expected)


def test_noise_has_the_learned_scale_and_only_while_training():
    torch.manual_seed(0)
    router = nb.NoisyRouter(width=6, experts=4, k=2)
    with torch.no_grad():
        router.weight.normal_()
        router.noise.normal_()
    x = torch.randn(3, 6)
    clean = x @ router.weight.T
    drawn = torch.stack([router.logits(x) for _ in range(4000)])
    scale = torch.log(1 + torch.exp(x @ router.noise.T))
    torch.testing.assert_close(drawn.mean(0), clean, rtol=0, atol=0.15)
    torch.testing.assert_close(drawn.std(0), scale, rtol=0.06, atol=0)
    torch.testing.assert_close(router.eval().logits(x), clean)
    router.train().logits(x).sum().backward()
    assert router.noise.grad.abs().min() > 0


def test_the_losses_train_the_load_even_and_the_logits_small():
    torch.manual_seed(0)
    weight = torch.randn(8, 16, requires_grad=True)
    x = torch.randn(512, 16) + 1
    optimizer = torch.optim.Adam([weight], lr=0.02)
    start = nb.route(F.linear(x, weight), 2)
    for _ in range(200):
        routing = nb.route(F.linear(x, weight), 2)
        optimizer.zero_grad()
        (nb.balancing_loss(routing) + 0.1 * nb.z_loss(routing)).backward()
        optimizer.step()
    after = nb.route(F.linear(x, weight), 2)
    assert nb.spread(nb.load_of(after.chosen, 8)) < 0.3 * nb.spread(nb.load_of(start.chosen, 8))
    assert nb.z_loss(after) < 0.3 * nb.z_loss(start)


def test_the_language_model_does_not_look_ahead_and_learns():
    torch.manual_seed(0)
    model = nb.LanguageModel(20, experts=4, k=2)
    text = torch.arange(600) % 20
    history = nb.train(model, text, steps=30, balance=0.01, z=0.001)
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    model.eval()
    one = text[:16][None]
    two = one.clone()
    two[0, 10:] = 0
    torch.testing.assert_close(model(one)[:, :10], model(two)[:, :10])
    dense = nb.LanguageModel(20, experts=1, k=1, hidden=2 * nb.HIDDEN)
    routers = sum(layer.router.weight.numel() for layer in model.mixtures())
    assert nb.active_weights(model) == nb.active_weights(dense) + routers


@pytest.mark.parametrize("name, loss", [("balance", nb.balancing_loss), ("z", nb.z_loss)])
def test_training_adds_each_loss(name, loss):
    text = torch.arange(600) % 20

    def after(**losses):
        torch.manual_seed(0)
        model = nb.LanguageModel(20, experts=4, k=2)
        nb.train(model, text, steps=30, **losses)
        return sum(loss(routing).item() for routing in nb.evaluate(model, text)[1])

    assert after(**{name: 1.0}) < after()


def test_an_evaluation_drops_nothing():
    model = nb.LanguageModel(20, experts=4, k=2, factor=0.5)
    nb.evaluate(model, torch.arange(600) % 20)
    assert all(layer.kept.all() for layer in model.mixtures())
