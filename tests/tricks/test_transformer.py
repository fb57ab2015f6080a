"""The transformer of the notebook against PyTorch's layers and transformers' Llama."""

import pytest
import torch
from torch.nn import functional as F

from llm_tricks.notebook import definitions

nb = definitions("transformer")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def masks(kind: str, batch: int, queries: int, keys: int):
    """A mask that broadcasts to [batch, heads, queries, keys]; every query sees at least one key."""
    if kind == "none":
        return None
    if kind == "causal":
        return nb.causal_mask(queries, keys)
    ids = torch.ones(batch, keys, dtype=torch.long)
    ids[0, keys // 2 + 1 :] = 0
    if kind == "padding":
        return nb.padding_mask(ids, pad=0)
    if kind == "both":
        return nb.padding_mask(ids, pad=0) & nb.causal_mask(queries, keys)
    some = torch.rand(batch, 1, queries, keys) < 0.5
    some[..., 0] = True
    return some


@pytest.mark.parametrize("kind", ["none", "causal", "padding", "both", "random"])
@pytest.mark.parametrize("size", [(1, 1, 1, 1, 4), (2, 3, 5, 5, 8), (3, 2, 4, 9, 16), (2, 8, 17, 17, 64)])
def test_attention_and_its_gradients_are_pytorchs(kind, size):
    batch, heads, queries, keys, d = size
    torch.manual_seed(queries)
    mask, weight = masks(kind, batch, queries, keys), torch.randn(batch, heads, queries, d)
    ours = [torch.randn(batch, heads, n, d, requires_grad=True) for n in (queries, keys, keys)]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    mine, other = nb.attention(*ours, mask)[0], F.scaled_dot_product_attention(*theirs, attn_mask=mask)
    torch.testing.assert_close(mine, other, **CLOSE)
    (mine * weight).sum().backward()
    (other * weight).sum().backward()
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, two.grad, **CLOSE)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_the_causal_mask_is_the_is_causal_of_pytorch(n):
    torch.manual_seed(n)
    q, k, v = torch.randn(3, 2, 4, n, 8)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(nb.attention(q, k, v, nb.causal_mask(n, n))[0], theirs, **CLOSE)


def test_another_scale_is_pytorchs_scale():
    q, k, v = torch.randn(3, 2, 4, 5, 8)
    theirs = F.scaled_dot_product_attention(q, k, v, scale=1.0)
    torch.testing.assert_close(nb.attention(q, k, v, scale=1.0)[0], theirs, **CLOSE)


def test_a_query_that_sees_nothing_spoils_no_gradient():
    q, k, v = (torch.randn(2, 3, 4, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[False, False, False], [True, False, False], [True, True, False]])
    nb.attention(q, k, v, mask)[0][:, 1:].sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_positions_are_sines_and_cosines_and_the_rotation_is_that_of_complex_numbers():
    table = nb.sinusoidal(50, 8)
    assert table[7, 4].item() == pytest.approx(torch.tensor(7 / 10000 ** (4 / 8)).sin().item(), abs=1e-6)
    assert table[7, 5].item() == pytest.approx(torch.tensor(7 / 10000 ** (4 / 8)).cos().item(), abs=1e-6)
    x, places = torch.randn(2, 5, 8), torch.tensor([0, 1, 5, 9, 40])
    angles = places[:, None] / 500.0 ** (torch.arange(4) / 4)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(nb.rotate(x, *nb.rotation(places, 8, 500.0)), torch.cat([turned.real, turned.imag], -1))


@pytest.mark.parametrize("width", [1, 8, 33])
def test_norms_are_pytorchs(width):
    x = 3 * torch.randn(4, 5, width) + 2
    pairs = (
        (nb.LayerNorm(width), torch.nn.LayerNorm(width)),
        (nb.RMSNorm(width, 1e-3), torch.nn.RMSNorm(width, eps=1e-3)),
    )
    for ours, theirs in pairs:
        with torch.no_grad():
            for weight in ours.parameters():
                weight.normal_()
        theirs.load_state_dict(ours.state_dict())
        torch.testing.assert_close(ours(x), theirs(x), **CLOSE)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("kind", ["EncoderLayer", "DecoderLayer"])
@pytest.mark.parametrize("heads", [1, 2, 8])
def test_layers_of_the_paper_are_pytorchs(kind, activation, heads):
    torch.manual_seed(heads)
    ours = getattr(nb, kind)(16, heads, 24, getattr(F, activation))
    with torch.no_grad():
        for weight in ours.parameters():
            weight.add_(0.1 * torch.randn_like(weight))  # norms and biases away from 1 and 0
    theirs = nb.torch_twin(ours, activation)
    mine, other = torch.randn(3, 6, 16, requires_grad=True), None
    other, source = mine.detach().clone().requires_grad_(), torch.randn(3, 9, 16)
    real = torch.arange(9 if kind == "DecoderLayer" else 6) < torch.tensor([[4], [9], [2]])
    if kind == "EncoderLayer":
        results = ours(mine, real[:, None, None, :]), theirs(other, src_key_padding_mask=~real)
    else:
        causal = nb.causal_mask(6, 6)
        results = (
            ours(mine, source, causal, real[:, None, None, :]),
            theirs(other, source, tgt_mask=~causal, memory_key_padding_mask=~real),
        )
    torch.testing.assert_close(*results, **CLOSE)
    weight = torch.randn(3, 6, 16)
    for result in results:
        (result * weight).sum().backward()
    torch.testing.assert_close(mine.grad, other.grad, **CLOSE)


SHAPES = {
    "grouped": {},
    "one group": {"kv_heads": 1},
    "not grouped": {"kv_heads": 4},
    "tied": {"tied": True},
    "theta": {"theta": 500_000.0, "eps": 1e-3},
    "one wide head": {"width": 32, "heads": 1, "kv_heads": 1, "layers": 1},
    "deep": {"layers": 5, "heads": 8, "kv_heads": 2, "width": 64, "vocabulary": 50},
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("padded", [False, True])
def test_the_decoder_is_transformers_llama(name, padded):
    torch.manual_seed(len(name))
    shape = nb.Shape(**({"theta": 10000.0} | SHAPES[name]))
    theirs = nb.llama(shape)
    with torch.no_grad():
        for weight_name, weight in theirs.named_parameters():
            if "norm" in weight_name:
                weight.uniform_(0.5, 1.5)
    ours = nb.from_llama(theirs, shape)
    ids, real = torch.randint(shape.vocabulary, (3, 11)), torch.ones(3, 11, dtype=torch.bool)
    if padded:
        real[1, :4] = real[2, :10] = False
    positions = (real.cumsum(dim=1) - 1).clamp(min=0)
    mine = ours(ids, real, positions)
    other = theirs(input_ids=ids, attention_mask=real.long(), position_ids=positions).logits
    torch.testing.assert_close(mine[real], other[real], **CLOSE)
    for scores in (mine, other):
        F.cross_entropy(scores[real], ids[real]).backward()
    torch.testing.assert_close(ours.embedding.weight.grad, theirs.model.embed_tokens.weight.grad, **CLOSE)
    key = theirs.model.layers[0].self_attn.k_proj.weight.grad
    torch.testing.assert_close(ours.layers[0].attention.k.weight.grad, key, **CLOSE)
    assert (ours.output.weight is ours.embedding.weight) == shape.tied


@pytest.mark.parametrize("fields", [*SHAPES.values(), {"positions": "sinusoidal"}, {"positions": "none"}])
def test_writing_with_a_cache_is_writing_without_and_padding_changes_nothing(fields):
    torch.manual_seed(3)
    model = nb.Decoder(nb.Shape(**fields))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)  # sharper choices
    ids, real = torch.randint(model.shape.vocabulary, (2, 7)), torch.ones(2, 7, dtype=torch.bool)
    real[1, :3] = False
    cached = nb.generate(model, ids, 12, True, real)
    assert torch.equal(cached, nb.generate(model, ids, 12, False, real))
    assert torch.equal(cached[1:, 3:], nb.generate(model, ids[1:, 3:], 12))
    assert cached[:, 7:].unique().numel() > 1, "a model that repeats one token tells nothing"


@pytest.mark.parametrize("positions", ["rotary", "sinusoidal"])
def test_scores_in_pieces_with_a_cache_are_those_of_the_whole(positions):
    torch.manual_seed(5)
    model, ids = nb.Decoder(nb.Shape(positions=positions)), torch.randint(12, (2, 9))
    cache = [nb.Cache() for _ in model.layers]
    pieces = [model(ids[:, part], cache=cache) for part in (slice(0, 4), slice(4, 5), slice(5, 9))]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), **CLOSE)


def test_greedy_writing_is_transformers():
    torch.manual_seed(0)
    shape = nb.Shape(layers=3)
    theirs = nb.llama(shape)
    ids = torch.randint(12, (2, 5))
    written = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=15, do_sample=False)
    assert torch.equal(nb.generate(nb.from_llama(theirs, shape), ids, 15), written)


def test_sums_are_right_and_no_held_out_sum_is_trained_in_either_order():
    rows = nb.sums()
    number = rows[:, 0] * 10 + rows[:, 1] + rows[:, 3] * 10 + rows[:, 4]
    assert torch.equal(rows[:, 6] + 10 * rows[:, 7] + 100 * rows[:, 8], number) and len(rows.unique(dim=0)) == 10_000
    assert torch.equal(nb.sums(lowest_first=False)[:, 6:], rows[:, 6:].flip(1))
    parts = [{tuple(row) for row in part.tolist()} for part in nb.split_sums(rows)]
    assert sum(map(len, parts)) == 10_000
    for number, part in enumerate(parts):
        swapped = {(*row[3:5], row[2], *row[:2], *row[5:]) for row in part}
        assert swapped == part
        assert not any(part & other for other in parts[number + 1 :])


def test_a_sum_with_one_wrong_digit_is_wrong(monkeypatch):
    rows = nb.sums()[[5, 4711, 9999]]
    written = rows.clone()
    written[1, 8] += 1
    monkeypatch.setattr(nb, "generate", lambda *_: written)
    assert nb.right_sums(None, rows).tolist() == [True, False, True]


@pytest.mark.parametrize("task", ["copy", "reverse"])
def test_sequences_are_copied_or_reversed_and_held_out_ones_never_trained(task):
    for held_out in (False, True):
        source, target = nb.sequences(task, 200, held_out)
        assert source.shape == (200, 9) and target.shape == (200, 10)
        for one, two in zip(source.tolist(), target.tolist(), strict=True):
            symbols = one[: one.index(nb.END)]
            assert 4 <= len(symbols) <= 8
            written = symbols if task == "copy" else symbols[::-1]
            assert two == [nb.BEGIN, *written, nb.END] + [nb.PAD] * (8 - len(symbols))
            assert (sum(symbol - nb.END - 1 for symbol in symbols) % 5 == 0) == held_out


def test_a_sequence_with_one_wrong_symbol_is_wrong(monkeypatch):
    def translate(_, source):
        torch.manual_seed(0)
        written = nb.sequences("copy", 8, held_out=True)[1]
        written[3, 2] = 3 + (written[3, 2] - 2) % nb.SYMBOLS
        return written

    monkeypatch.setattr(nb, "translate", translate)
    torch.manual_seed(0)
    assert nb.share_right(None, "copy", 8) == 7 / 8
