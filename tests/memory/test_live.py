"""Counting the bytes of tensors: those that live, their peak, and gradients apart."""

import torch

from utils.memory.live import LiveBytes

KB = 256  # float32 numbers
MODEL = torch.nn.Linear(2, 2)


def test_tensors_count_while_they_live_and_the_peak_stays():
    live = LiveBytes(MODEL)
    with live.mode:
        first = torch.zeros(4 * KB)
        second = torch.ones(2 * KB)
        assert live.now == live.peak == 6 * 1024
        del first
        assert (live.now, live.peak) == (2 * 1024, 6 * 1024)
        live.restart_peaks()
        third = second + 1
    assert (live.now, live.peak) == (4 * 1024, 4 * 1024)
    del second, third
    assert live.now == 0


def test_views_weights_and_meta_tensors_do_not_count():
    model = torch.nn.Linear(KB, 4, bias=False)
    live = LiveBytes(model)
    with live.mode:
        kept = [model.weight.t(), model.weight.detach(), torch.empty(KB, device="meta")]
        assert live.now == 0
        rows = torch.zeros(4, KB)
        kept += [rows[0], rows.view(-1)]
    assert live.now == 4 * 1024


def test_a_gradient_counts_apart_and_in_the_late_peak():
    live = LiveBytes(MODEL)
    with live.mode:
        gradient = torch.zeros(3 * KB)
        live.is_gradient(gradient)
        assert (live.now, live.gradients) == (0, 3 * 1024)
        live.is_late = True
        states = torch.zeros(KB)
    assert (live.early, live.late, live.peak) == (3 * 1024, 4 * 1024, 3 * 1024)
    del states
