"""ZeRO of the notebook against torch.optim.AdamW, ZeroRedundancyOptimizer, fully_shard and DeepSpeed's estimates."""

import multiprocessing
import os
import time
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from llm_tricks.notebook import definitions

nb = definitions("deepspeed_zero")
STEPS = 4
EXACT = {torch.float32: {"rtol": 0, "atol": 1e-6}, torch.float64: {"rtol": 0, "atol": 1e-12}}


def small(name: str, layers, images, labels, dtype, net=None, parts: int = 1) -> dict:
    """One rank's training of any layers on its share of batches [steps, n, in], by the notebook's engine."""
    net, memory = (net or nb.Ring)(), nb.Memory()
    share = slice(net.rank, None, net.ranks)
    images, labels = images[:, share].to(dtype), labels[:, share]
    with memory.at("batch"):
        memory.note(images)
        memory.note(labels)
    with memory:
        engine = nb.STAGES[name](layers, net, memory, dtype, lr=1e-2)
        for x, y in zip(images, labels, strict=True):
            report = nb.one_step(engine, x, y, parts)
    return report | {"weights": nb.all_weights(engine), "units": [(u.size, u.length) for u in engine.units]}


def task(seed: int, width: int, size: int = 12):
    """Layers, and smooth data whose gradients do not cancel to nothing."""
    torch.manual_seed(seed)
    layers = torch.nn.Sequential(
        torch.nn.Linear(5, width), nb.Block(width), torch.nn.Sequential(torch.nn.Linear(width, 3, bias=False))
    )
    return layers, torch.randn(STEPS, size, 5) + 1, torch.randint(3, (STEPS, size))


def flat_weights(layers):
    return torch.cat([p.detach().flatten() for p in layers.parameters()])


def trained_alone(layers, images, labels, dtype, parts: int = 1):
    """torch's AdamW in one process on whole batches."""
    layers = layers.to(dtype)
    optimizer = torch.optim.AdamW(layers.parameters(), lr=1e-2)
    for x, y in zip(images.to(dtype), labels, strict=True):
        optimizer.zero_grad()
        F.cross_entropy(layers(x), y).backward()
        optimizer.step()
    return flat_weights(layers)


def many(jobs: list, layers, *data) -> list[dict]:
    """Several trainings from the same start, one after the other: jobs are what comes after the data."""
    return [small(name, deepcopy(layers), *data, *rest) for name, *rest in jobs]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "width", "seed"), [(1, 4, 0), (2, 7, 1), (3, 7, 2), (4, 10, 3)])
def test_every_stage_ends_where_adamw_in_one_process_ends(ranks, width, seed):
    data = task(seed, width)
    wanted = nb.launch(1, trained_alone, *data, torch.float64)[0]
    parts = 3 if ranks == 4 else 2
    jobs = [
        (name, torch.float64, net, k) for name in nb.STAGES for net in (nb.Ring, nb.Collectives) for k in (1, parts)
    ]
    for rank in nb.launch(ranks, many, jobs, *data):
        for job, report in zip(jobs, rank, strict=True):
            torch.testing.assert_close(
                report["weights"], wanted, **EXACT[torch.float64], msg=lambda m, job=job: f"{job} {m}"
            )
    moved = (wanted - flat_weights(data[0])).abs().max()
    assert moved > 1e-2, "the weights have gone somewhere"


@pytest.mark.parametrize("seed", [0, 5])
def test_in_float32_too(seed):
    data = task(seed, 9)
    wanted = nb.launch(1, trained_alone, *data, torch.float32)[0]
    for rank in nb.launch(2, many, [(name, torch.float32) for name in nb.STAGES], *data):
        for report in rank:
            torch.testing.assert_close(report["weights"], wanted, **EXACT[torch.float32])


def with_zero_redundancy_optimizer(layers, images, labels, dtype):
    """torch's own stage 1: DDP and a split optimizer."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    share = slice(dist.get_rank(), None, dist.get_world_size())
    model = torch.nn.parallel.DistributedDataParallel(layers.to(dtype))
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)
    for x, y in zip(images[:, share].to(dtype), labels[:, share], strict=True):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    mine = sum(state.numel() for each in optimizer.optim.state.values() for state in each.values())
    return flat_weights(model), mine


def with_fully_shard(layers, images, labels, dtype):
    """torch's own stage 3, layer by layer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    share = slice(dist.get_rank(), None, dist.get_world_size())
    mesh, layers = init_device_mesh("cpu", (dist.get_world_size(),)), layers.to(dtype)
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    model = fully_shard(layers, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for x, y in zip(images[:, share].to(dtype), labels[:, share], strict=True):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    held = sum(p.to_local().numel() for p in model.parameters())
    return torch.cat([p.full_tensor().detach().flatten() for p in model.parameters()]), held


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("dtype", EXACT)
def test_stage_1_is_torchs_zero_redundancy_optimizer(seed, dtype):
    data = task(seed, 7)
    theirs = nb.launch(2, with_zero_redundancy_optimizer, *data, dtype)
    for ours in nb.launch(2, small, "zero1", *data, dtype):
        torch.testing.assert_close(ours["weights"], theirs[0][0], **EXACT[dtype])
    assert all(0 < mine < 2 * len(theirs[0][0]) for _, mine in theirs), "theirs is split as well"


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("dtype", EXACT)
def test_stage_3_is_torchs_fully_shard(seed, dtype):
    data = task(seed, 7)
    theirs = nb.launch(2, with_fully_shard, *data, dtype)
    for ours in nb.launch(2, small, "zero3", *data, dtype):
        torch.testing.assert_close(ours["weights"], theirs[0][0], **EXACT[dtype])
    assert sum(held for _, held in theirs) == len(theirs[0][0]), "each rank holds its own part only"


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_what_a_rank_holds_is_the_formula_to_the_byte(ranks):
    for rank in nb.launch(ranks, many, [(name, torch.bfloat16) for name in nb.STAGES], *task(0, 8)):
        for name, report in zip(nb.STAGES, rank, strict=True):
            padded = sum(length for _, length in report["units"])
            assert 0 <= padded - sum(size for size, _ in report["units"]) <= (ranks - 1) * len(report["units"])
            wanted = {key: value * padded for key, value in nb.formula(name, ranks).items()}
            assert report["after backward"] == pytest.approx(wanted, rel=1e-12)
            for place in ("card", "cpu"):
                rest = [v for key, v in wanted.items() if key.startswith(place) and not key.endswith("gradients")]
                assert report["held at rest"][place] == pytest.approx(sum(rest), rel=1e-12)


def test_the_peak_is_above_the_formula_by_a_layer_and_not_by_a_model():
    for name in nb.STAGES:
        report = nb.launch(2, nb.run, name, torch.bfloat16, 2)[0]
        psi = len(report["weights"])
        on_card = psi * sum(value for key, value in nb.formula(name, 2).items() if key.startswith("card"))
        assert on_card < report["peak"] < on_card + 1.4 * psi


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_collectives_of_each_stage_and_what_they_send(ranks):
    reduce, gather, all_reduce = "reduce-scatter", "all-gather", "all-reduce"
    wanted = {
        "zero0": [all_reduce] * 3,
        "zero1": [reduce, gather] * 3,
        "zero2": [reduce] * 3 + [gather] * 3,
        "zero3": [gather] * 3 + [gather, reduce] * 3,
    }
    rounds = {"zero0": 2, "zero1": 2, "zero2": 2, "zero3": 3}
    bus = {"zero2_offload": (2, 2), "zero3_offload": (4, 2)}  # to the card, to the CPU; ·Ψ/N
    jobs = [(name, torch.bfloat16, net) for name in nb.STAGES for net in (nb.Ring, nb.Collectives)]
    for rank in nb.launch(ranks, many, jobs, *task(0, 7)):
        for (name, *_), report in zip(jobs, rank, strict=True):
            plain, padded = name.removesuffix("_offload"), sum(length for _, length in report["units"])
            assert report["log"] == wanted[plain]
            assert report["sent"] == rounds[plain] * (ranks - 1) * 2 * padded // ranks
            to_card, to_cpu = bus.get(name, (0, 0))
            assert report["bus"] == {"card": to_card * padded // ranks, "cpu": to_cpu * padded // ranks}


def ring_and_torch(length: int, seed: int):
    """The ring's results and those of torch's older calls."""
    ring = nb.Ring()
    vector = torch.randn(length, generator=torch.Generator().manual_seed(seed + ring.rank)).double()
    summed, parts = vector.clone(), [torch.empty_like(vector) for _ in range(ring.ranks)]
    dist.all_reduce(summed)
    dist.all_gather(parts, vector)
    whole = vector.new_empty(length * ring.ranks)
    ring.all_gather(whole, vector)
    mine = summed.chunk(ring.ranks)[ring.rank]
    return [
        (ring.reduce_scatter(vector), mine),
        (ring.all_reduce(vector.clone()), summed),
        (whole, torch.cat(parts)),
    ]


@pytest.mark.parametrize(("ranks", "length"), [(1, 3), (2, 2), (2, 10), (3, 9), (4, 8)])
def test_the_ring_does_what_torch_does(ranks, length):
    for pairs in nb.launch(ranks, ring_and_torch, length, 10 * ranks):
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_formula_and_deepspeeds_estimates():
    """DeepSpeed holds a float32 gradient for the step and, unless told not to, adds half to CPU memory."""
    zero3 = pytest.importorskip("deepspeed.runtime.zero.stage3").estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as zero2

    psi, layer = 7_000_000, 300_000
    for ranks in (1, 2, 8):
        formulas = {name: nb.formula(name, ranks) for name in nb.STAGES}
        card, cpu = ({name: psi * sum(size for key, size in each.items() if key.startswith(place))
                      for name, each in formulas.items()} for place in ("card", "cpu"))  # fmt: skip
        # a float32 gradient beside the bf16 one, at the step
        assert zero2(psi, ranks, cpu_offload=False)[1] == pytest.approx(card["zero2"] + 4 * psi / ranks)
        host, gpu = zero2(psi, ranks, cpu_offload=True, additional_buffer_factor=1)
        assert gpu == card["zero2_offload"] == 2 * psi
        # the gradient in CPU memory is float32, not bf16; with many ranks loading the model in each takes more
        assert host == max(4 * psi * ranks, cpu["zero2_offload"] * ranks + 2 * psi)
        # a float32 gradient instead of the bf16 one; and one layer's weights and gradient in bf16
        gpu = zero3(psi, layer, ranks, cpu_offload=False)[1]
        assert gpu == pytest.approx(card["zero3"] + 2 * psi / ranks + 4 * layer)
        host, gpu, _ = zero3(psi, layer, ranks, cpu_offload=True, cpu_offload_params=True, additional_buffer_factor=1)
        assert gpu == card["zero3_offload"] + 4 * layer
        assert host == cpu["zero3_offload"] * ranks + 2 * psi


def fails_on_one_rank():
    if dist.get_rank() == 1:
        raise ValueError("rank 1 has had enough")
    dist.barrier()


def never_ends():
    time.sleep(1000)


def dies():
    os._exit(3)


@pytest.mark.parametrize(
    ("function", "error", "text"),
    [(fails_on_one_rank, ValueError, "enough"), (never_ends, TimeoutError, "not done"), (dies, TimeoutError, "died")],
)
def test_a_process_that_fails_hangs_or_dies_ends_the_launch_and_leaves_nothing(
    function, error, text, tmp_path, monkeypatch
):
    monkeypatch.setattr(nb.tempfile, "tempdir", str(tmp_path))
    shared, began = set(Path("/dev/shm").glob("*")), time.monotonic()
    with pytest.raises(error, match=text):
        nb.launch(2, function, seconds=2)
    assert time.monotonic() - began < 20
    assert not multiprocessing.active_children() and not list(tmp_path.iterdir())
    assert nb.launch(2, nb.who_am_i)[1][0] == 1, "and the next one works"
    made = set(Path("/dev/shm").glob("*")) - shared
    assert not [path for path in made if path.exists() and path.name.startswith(("torch_", "psm_", "sem."))]
