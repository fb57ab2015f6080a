"""Padding, grouping and packing of the notebook against TRL, transformers and this framework's collator."""

import json
import runpy

import numpy as np
import pytest
import torch
from conftest import ROOT
from datasets import Dataset
from tiny import ARCHITECTURES, PAIRS, ROWS, byte_level_tokenizer, config_for
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.masking_utils import create_causal_mask
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import pack_dataset

from llm_tricks.notebook import definitions
from utils.data.collate import build_collator
from utils.runtime.errors import UserError

nb = definitions("packing")
HERE = ROOT / "llm_tricks" / "packing"
SETS = nb.read_lengths(str(HERE / "lengths.json"))
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
IGNORED = -100


def some_lengths(seed: int, rows: int = 200, longest: int = 60):
    return np.random.default_rng(seed).integers(1, longest + 1, rows)


def by_hand(lengths, room, rule, order):
    """The bins, with nothing but lists."""
    bins = []
    for row in order:
        space = [room - sum(lengths[other] for other in one) for one in bins]
        fitting = [number for number, free in enumerate(space) if free >= lengths[row]]
        if rule == "next":
            fitting = [number for number in fitting if number == len(bins) - 1]
        if not fitting:
            bins.append([row])
        elif rule == "best":
            bins[min(fitting, key=lambda number: space[number])].append(row)
        else:
            bins[fitting[0]].append(row)
    return bins


@pytest.mark.parametrize("rule", ["next", "first", "best"])
@pytest.mark.parametrize("seed", range(4))
def test_packing_is_the_rule_by_hand_and_cuts_nothing(rule, seed):
    lengths = some_lengths(seed)
    for order in (nb.shuffled(lengths, seed), nb.decreasing(lengths)):
        bins = nb.pack(lengths, 64, rule, order)
        assert bins == by_hand(lengths.tolist(), 64, rule, order.tolist())
        assert sorted(row for rows in bins for row in rows) == list(range(len(lengths)))
        assert max(lengths[rows].sum() for rows in bins) <= 64
    assert lengths[nb.decreasing(lengths)].tolist() == sorted(lengths.tolist(), reverse=True)
    with pytest.raises(ValueError, match="61 tokens does not go into a bin of 60"):
        nb.pack(np.array([61]), 60, rule, [0])


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("room", [None, 2048])
def test_best_fit_decreasing_is_trls_in_one_batch_and_no_worse_than_its_default(name, room):
    lengths = SETS[name][nb.shuffled(SETS[name])][:2500]
    room = room or int(lengths.max())
    ours = [lengths[rows].tolist() for rows in nb.pack(lengths, room, "best", nb.decreasing(lengths))]
    rows = Dataset.from_dict({"input_ids": [list(range(length)) for length in lengths]})
    theirs = pack_dataset(rows, room, strategy="bfd", map_kwargs={"batch_size": len(rows)})
    assert sorted(map(sorted, ours)) == sorted(sorted(one) for one in theirs["seq_lengths"])
    assert len(ours) <= len(pack_dataset(rows, room, strategy="bfd"))
    assert -(-lengths.sum() // room) <= len(ours) <= len(nb.pack(lengths, room, "next", range(len(lengths))))


@pytest.mark.parametrize("batch", [2, 8, 50])
@pytest.mark.parametrize("name", ["alpaca_zh", "multiturn", "dpo_zh"])
def test_grouping_is_transformers(name, batch):
    lengths = SETS[name][nb.shuffled(SETS[name], 1)]
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        assert nb.grouped_order(lengths, batch, seed) == get_length_grouped_indices(
            lengths.tolist(), batch, generator=generator
        )
    assert len(nb.grouped_order(np.array([3, 1, 2]), 8)) == 3, "fewer rows than a mega-batch"


def test_waste_and_counts_are_those_of_the_tensors():
    lengths = some_lengths(0, rows=21)
    steps = nb.in_steps(nb.shuffled(lengths), 4)
    rows = [[5] * length for length in lengths.tolist()]
    collate = {free: build_collator(0, padding_free=free) for free in (False, True)}
    tensors = {
        free: [collate[free]([{"input_ids": rows[row], "labels": rows[row]} for row in step]) for step in steps]
        for free in (False, True)
    }
    for free, shape in ((False, "padded"), (True, "end to end")):
        ids = [batch["input_ids"] for batch in tensors[free]]
        found = nb.counts(lengths, steps, shape)
        tokens = sum(int((one != 0).sum()) for one in ids)
        assert found["computed"] == sum(one.numel() for one in ids)
        assert found["padding"] == pytest.approx(1 - tokens / found["computed"])
        assert found["pairs"] == pytest.approx(sum(one.numel() * one.shape[1] for one in ids) / tokens)
        assert found["largest"] == max(one.numel() for one in ids)
    assert nb.waste(lengths, steps) == pytest.approx(nb.counts(lengths, steps, "padded")["padding"])
    masks = [nb.block_mask(batch["position_ids"]) for batch in tensors[True]]
    assert nb.needed_pairs(lengths) == pytest.approx(sum(int(mask.sum()) for mask in masks) / lengths.sum())
    bins = nb.pack(lengths, 64, "best", nb.decreasing(lengths))
    filled = nb.counts(lengths, bins, 64)
    assert filled["padding"] == pytest.approx(nb.unfilled(lengths, bins, 64)) and filled["pairs"] > 64
    # a model of width d: 12 d² multiplications a token, 2 d a pair
    assert nb.work(filled, 10) == pytest.approx(
        (12 * 100 + 2 * 10 * filled["pairs"] * (1 - filled["padding"])) / (1200 * (1 - filled["padding"]))
    )


def test_the_share_between_steps_is_one_for_equal_rows_and_small_by_chance():
    lengths = np.repeat([10, 20, 40], 8)
    assert nb.between_steps(lengths, nb.in_steps(range(24), 8)) == pytest.approx(1)
    by_chance = [nb.between_steps(lengths, nb.in_steps(nb.shuffled(lengths, seed), 8)) for seed in range(200)]
    assert np.mean(by_chance) == pytest.approx(2 / 23, abs=0.02)  # (steps − 1) / (rows − 1)


def test_joined_and_cut_rows_are_trls_wrapped_ones():
    lengths = some_lengths(3, rows=50)
    rows = Dataset.from_dict({"row": [[number] * length for number, length in enumerate(lengths.tolist())]})
    bins = pack_dataset(rows, 64, strategy="wrapped")["row"]
    in_bins = [len({place for place, one in enumerate(bins) if row in one}) for row in range(50)]
    assert nb.cut_rows(lengths, 64) == sum(count > 1 for count in in_bins) > 0


@pytest.mark.parametrize("sizes", [(3, 1, 5), (1, 1), (6,), (2, 2, 2, 9)])
def test_the_mask_is_that_of_the_definition_and_transformers(sizes):
    positions = torch.cat([torch.arange(size) for size in sizes])[None]
    example = [number for number, size in enumerate(sizes) for _ in range(size)]
    n = len(example)
    expected = [[example[q] == example[k] and k <= q for k in range(n)] for q in range(n)]
    assert nb.block_mask(positions)[0].tolist() == expected
    config = config_for("qwen2", 50)
    config._attn_implementation = "eager"  # SDPA's mask is left out where a plain causal one will do
    theirs = create_causal_mask(
        config=config,
        inputs_embeds=torch.zeros(1, n, 64),
        attention_mask=None,
        past_key_values=None,
        position_ids=positions,
    )
    assert torch.equal(theirs[0, 0] == 0, nb.block_mask(positions)[0])


@pytest.mark.parametrize("seed", range(3))
def test_the_frameworks_collator_gives_the_same(seed):
    rows, labels = nb.random_rows(seed)
    labels[0] = rows[0]  # the first token's label goes
    examples = [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]
    theirs, ours = build_collator(0, padding_free=True)(examples), nb.end_to_end(rows, labels)
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(theirs[name], ours[name]), name
    packed = {"input_ids": sum(rows, []), "labels": sum(labels, []), "seq_lengths": [len(row) for row in rows]}
    again = build_collator(0, padding_free=True)([packed])
    assert all(torch.equal(again[name], ours[name]) for name in ours)
    filled, theirs = nb.padded(rows, labels), build_collator(0, padding_free=False)(examples)
    assert torch.equal(filled["input_ids"], theirs["input_ids"]) and torch.equal(filled["labels"], theirs["labels"])


def plainly(logits_of, model, rows, labels):
    """Loss and gradient of rows alone, one after another: the sum of −log p over the number of labels."""
    total, count = 0.0, 0
    for row, label in zip(rows, labels, strict=True):
        log_p = logits_of(torch.tensor([row]))[0].log_softmax(dim=-1)
        for place in range(1, len(row)):
            if label[place] != IGNORED:
                total, count = total - log_p[place - 1, label[place]], count + 1
    loss = total / count
    return loss.item(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def every_way(rows, labels) -> list[list[dict]]:
    """The rows alone, padded, end to end, and in two bins."""
    halves = [nb.end_to_end(rows[part], labels[part]) for part in (slice(2), slice(2, None))]
    return [nb.alone(rows, labels), [nb.padded(rows, labels)], [nb.end_to_end(rows, labels)], halves]


@pytest.mark.parametrize("learned", [0, 32])
@pytest.mark.parametrize("seed", range(3))
def test_the_decoder_takes_packed_rows_as_rows_alone(learned, seed):
    torch.manual_seed(seed)
    model = nb.Decoder(50, learned=learned)
    rows, labels = nb.random_rows(seed)

    def logits_of(ids):
        positions = torch.arange(ids.shape[1])[None]
        return model(ids, positions, nb.causal_mask(positions))

    expected = plainly(logits_of, model, rows, labels)
    for batches in every_way(rows, labels):
        loss, gradient = nb.loss_and_gradient(model, batches)
        assert loss == pytest.approx(expected[0], abs=1e-5)
        torch.testing.assert_close(gradient, expected[1], **CLOSE)
    one_row = [nb.end_to_end(rows, labels)]
    loss, gradient = nb.loss_and_gradient(model, one_row, nb.causal_mask)
    assert (gradient - expected[1]).norm() > 0.1 * expected[1].norm(), "without the mask it is another gradient"
    assert nb.leak(model, one_row[0]) == 0
    assert nb.leak(model, one_row[0], nb.causal_mask) > 0.05


def test_the_decoders_attention_is_pytorchs():
    torch.manual_seed(0)
    layer, x = nb.Layer(32, 4), torch.randn(2, 9, 32)
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3]] * 2)
    mask = nb.block_mask(positions)
    q, k, v = layer.qkv(layer.norm1(x)).view(2, 9, 3, 4, 8).permute(2, 0, 3, 1, 4)
    # a pair of numbers is a complex number, turned by e^{ipω}
    turn = torch.polar(torch.tensor(1.0), positions[:, None, :, None] * 10000.0 ** (-torch.arange(4) / 4))
    q, k = (torch.complex(*part.chunk(2, dim=-1)) * turn for part in (q, k))
    q, k = (torch.cat([part.real, part.imag], dim=-1) for part in (q, k))
    y = x + layer.out(
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None]).transpose(1, 2).reshape(2, 9, 32)
    )
    torch.testing.assert_close(layer(x, mask, positions), y + layer.down(F.gelu(layer.up(layer.norm2(y)))), **CLOSE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "qwen3", "mistral, window"])
def test_transformers_models_take_packed_rows_as_rows_alone(architecture, attention):
    options = {"sliding_window": 4} if "window" in architecture else {}
    torch.manual_seed(0)
    config = config_for(architecture.split(",")[0], 50, initializer_range=0.1, **options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    rows, labels = nb.random_rows(1)
    expected = plainly(lambda ids: model(input_ids=ids).logits, model, rows, labels)
    called = nb.FromTransformers(model)
    for batches in every_way(rows, labels):
        loss, gradient = nb.loss_and_gradient(called, batches)
        assert loss == pytest.approx(expected[0], abs=1e-5)
        torch.testing.assert_close(gradient, expected[1], **CLOSE)
    batch = nb.end_to_end(rows, labels)
    assert nb.leak(called, batch) == 0
    running_on = {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1])[None]}
    for options, given in (({"ones": True}, batch), ({"use_cache": True}, batch), ({}, running_on)):
        leaking = nb.FromTransformers(model, **options)
        assert nb.loss_and_gradient(leaking, [given])[0] != pytest.approx(expected[0], abs=1e-4), options
    short = nb.end_to_end(*nb.random_rows(1, sizes=(2, 4, 3)))  # the first token lies within the window
    for option in ("ones", "use_cache"):
        assert nb.leak(nb.FromTransformers(model, **{option: True}), short) > 0.001, option


def test_positions_may_run_on_only_where_distances_alone_count():
    rows, labels = nb.random_rows(0)
    batch = nb.end_to_end(rows, labels)
    running_on = torch.arange(batch["input_ids"].shape[1])[None]
    mask = nb.block_mask(batch["position_ids"])
    torch.manual_seed(0)
    for learned, same in ((0, True), (32, False)):
        model = nb.Decoder(50, learned=learned)
        one, two = (model(batch["input_ids"], positions, mask) for positions in (batch["position_ids"], running_on))
        assert torch.allclose(one, two, **CLOSE) == same


def test_dynamic_frequencies_follow_the_longest_position_of_the_row():
    scaled = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    for rope, same in (({"rope_type": "default", "rope_theta": 10000.0}, True), (scaled, False)):
        torch.manual_seed(0)
        config = config_for("llama", 50, max_position_embeddings=16, rope_parameters=rope, initializer_range=0.2)
        model = nb.FromTransformers(AutoModelForCausalLM.from_config(config))
        short, long = [[1, 2, 3, 4]], [list(range(1, 31))]
        alone = model(torch.tensor(short), torch.arange(4)[None])
        beside = nb.end_to_end(short + long, short + long)
        assert torch.allclose(model(beside["input_ids"], beside["position_ids"])[:, :4], alone, atol=1e-4) == same


def test_no_label_is_left_at_a_seam():
    texts = nb.random_rows(2)[0]
    batch = nb.end_to_end(texts, texts)
    assert batch["labels"][0][batch["position_ids"][0] == 0].tolist() == [IGNORED] * len(texts)
    assert nb.trained_tokens([batch]) == nb.trained_tokens(nb.alone(texts, texts)) == sum(len(t) - 1 for t in texts)
    torch.manual_seed(0)
    model = nb.Decoder(50)
    proper = nb.loss_and_gradient(model, [batch])[0]
    left_in = nb.loss_and_gradient(model, [{**batch, "labels": batch["input_ids"]}])[0]
    assert abs(left_in - proper) > 1e-3, "the mask does not help against a label at the seam"


def test_the_means_are_those_of_the_rows():
    torch.manual_seed(0)
    model = nb.Decoder(50)
    rows, labels = nb.random_rows(3, sizes=(7, 4, 12, 6))
    singles = [nb.loss_and_gradient(model, [one])[0] for one in nb.alone(rows, labels)]
    found = nb.row_means(model, nb.end_to_end(rows, labels))
    torch.testing.assert_close(found, torch.tensor(singles), **CLOSE)
    assert nb.mean_of_means(model, nb.alone(rows, labels)) == pytest.approx(np.mean(singles), abs=1e-5)
    two = [nb.end_to_end(rows[part], labels[part]) for part in (slice(1), slice(1, None))]
    assert abs(nb.mean_of_means(model, two) - nb.loss_and_gradient(model, two)[0]) > 1e-3


def test_padded_and_end_to_end_train_alike():
    rows = nb.random_rows(0, sizes=(7, 3, 12, 5, 9, 4))[0]
    steps = [[0, 1, 2], [3, 4, 5]] * 6
    curves = []
    for form in (nb.padded, nb.end_to_end):
        torch.manual_seed(0)
        curves.append(nb.train(nb.Decoder(50), rows, rows, steps, form))
    assert curves[0] == pytest.approx(curves[1], abs=1e-4) and curves[0][-1] < curves[0][0] - 0.3


def test_the_schedule_shows_every_row_once_an_epoch_in_a_new_order():
    lengths, between = some_lengths(0), {}
    for way in ("chance", "packed", "packed, decreasing"):
        epochs = [nb.schedule(lengths, way, 8, 240, 0, epoch) for epoch in range(2)]
        assert all(sorted(row for step in steps for row in step) == list(range(len(lengths))) for steps in epochs)
        assert epochs[0] != epochs[1]
        between[way] = nb.between_steps(lengths, epochs[0])
        if way != "chance":
            assert max(lengths[step].sum() for step in epochs[0]) <= 240
    assert between["packed, decreasing"] > 0.5 > max(between["chance"], between["packed"]), "decreasing sorts"


def test_the_kept_lengths_hold_counts_and_no_rows():
    for name, found in json.loads((HERE / "lengths.json").read_text(encoding="utf-8")).items():
        assert len(SETS[name]) == found["rows"] == sum(found["histogram"].values())
        assert SETS[name].sum() == found["tokens"] > found["trained_tokens"]
        assert SETS[name].max() <= nb.ROOM
        assert set(found) == {
            "source", "tokenizer", "vocabulary", "template", "rows", "rows_left_out", "tokens", "trained_tokens",
            "answers", "histogram",
        }  # fmt: skip
        assert "/" not in found["tokenizer"] and not found["source"].startswith("/")


COUNT = runpy.run_path(str(HERE / "count_lengths.py"))["main"]


def test_lengths_are_counted_as_the_framework_encodes(tmp_path, tiny_models):
    from utils.data.conversations import to_messages
    from utils.template import get_template

    tokenizer = AutoTokenizer.from_pretrained(tiny_models())
    data, out = tmp_path / "rows.jsonl", tmp_path / "lengths.json"
    bad = [{"instruction": "Hi", "output": ""}, {"text": "no conversation"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, *bad, PAIRS[0]]), encoding="utf-8")
    flags = ["--model_name_or_path", str(tiny_models()), "--template_name", "qwen2", "--out", str(out)]
    COUNT([*flags, "--data", str(data), "--name", "some"])
    COUNT([*flags, "--data", str(data), "--name", "more", "--source", "somewhere"])
    sets = json.loads(out.read_text(encoding="utf-8"))
    found = sets["some"]
    template = get_template("qwen2", tokenizer)
    turns = [to_messages(row) for row in ROWS]
    question = {"role": "user", "content": PAIRS[0]["prompt"]}
    turns += [[question, {"role": "assistant", "content": PAIRS[0][side]}] for side in ("chosen", "rejected")]
    encoded = [template.encode(messages, tokenizer) for messages in turns]
    lengths = [len(row["input_ids"]) for row in encoded]
    assert found["histogram"] == {str(length): lengths.count(length) for length in sorted(lengths)}
    assert found["trained_tokens"] == sum(label != IGNORED for row in encoded for label in row["labels"])
    assert (found["rows"], found["rows_left_out"], found["source"]) == (len(ROWS) + 2, 2, "rows.jsonl")
    assert sets["more"] == {**found, "source": "somewhere"}
    assert nb.read_lengths(str(out))["some"].tolist() == sorted(lengths)


def test_all_that_is_wrong_with_a_count_is_said_before_it_begins(tmp_path, tiny_models):
    data, broken = tmp_path / "rows.jsonl", tmp_path / "broken.json"
    data.write_text(json.dumps(ROWS[0]) + "\n", encoding="utf-8")
    byte_level_tokenizer().save_pretrained(tmp_path / "no_config")
    right = {
        "data": data, "model_name_or_path": tiny_models(), "template_name": "qwen2", "name": "some",
        "out": tmp_path / "lengths.json",
    }  # fmt: skip

    def problems(**flags) -> list[str]:
        with pytest.raises(UserError) as caught:
            COUNT([word for name, value in (right | flags).items() for word in (f"--{name}", str(value))])
        return [*map(str, caught.value.problems)]

    for value, said in (("[1]", "holds no sets"), ("{", "cannot be read"), ('{"some": 1}', "holds no sets")):
        broken.write_text(value, encoding="utf-8")
        assert said in problems(out=broken)[0] and broken.read_text(encoding="utf-8") == value
    missing = tmp_path / "none"
    found = problems(data=missing, model_name_or_path=missing, out=missing / "lengths.json")
    assert len(found) == 3 and all(str(missing) in one for one in found), "all at once"
    assert "make" in found[0] and "--data" in found[1] and "--model_name_or_path" in found[2]
    assert "--out" in problems(out=tmp_path)[0]
    assert "config.json" in problems(model_name_or_path=tmp_path / "no_config")[0]
    assert "qwen3" in problems(template_name="qwenn3")[0]
    assert not right["out"].exists()
