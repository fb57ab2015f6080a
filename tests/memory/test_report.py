"""The printed plan: its table, units, the sum of a setting, and what is proposed."""

import pytest

from utils.memory import Estimate, Setting
from utils.memory.report import Row, advice, as_json, cheapest, formula, table
from utils.memory.search import RESERVE


def row(mode="lora", layout="none", again=False, total=4_000_000_000, fits=None, **parts):
    values = dict.fromkeys(("parameters", "gradients", "optimizer", "activations", "logits", "buffers"), 0) | parts
    values["parameters"] += total - sum(values[name] for name in list(values)[:6]) + values.get("overlap", 0)
    return Row(Setting(mode, layout, again), Estimate(**values), fits)


ROWS = [
    row(fits=False), row(again=True, total=3_000_000_000, fits=False),
    row(layout="zero2", total=2_500_000_000, fits=True), row("qlora", total=1_000_000_000, fits=True),
]  # fmt: skip


def test_the_table_has_a_column_for_each_layout_and_marks_what_fits():
    header, *lines = table(ROWS, ROWS[0].setting).splitlines()
    assert header.split() == ["GB", "on", "each", "GPU", "none", "zero2"]
    cells = {line[:32].strip(): line[32:].split("  ") for line in lines}
    found = {name: [cell.strip() for cell in parts if cell.strip()] for name, parts in cells.items()}
    assert found == {
        "lora": ["4.0", "2.5 ✓"], "lora, gradient checkpointing": ["3.0", "–"], "qlora": ["1.0 ✓", "–"],
    }  # fmt: skip


def test_small_models_are_shown_in_megabytes():
    small = [row(total=99_000_000, fits=True)]
    assert table(small, small[0].setting).splitlines()[0].startswith("MB on each GPU")
    assert "99.0 ✓" in table(small, small[0].setting)


@pytest.mark.parametrize(("gpus", "layout"), [(2, "zero2"), (1, "none")])
def test_the_cheapest_is_the_first_that_fits_and_splits_among_several_gpus(gpus, layout):
    assert cheapest(ROWS, gpus).setting.layout == layout
    assert cheapest(ROWS[:2], gpus) is None


def test_the_sum_of_a_setting_names_each_part_overlap_and_host_memory():
    found = formula(row(gradients=10**9, overlap=5 * 10**8, host=2 * 10**9, words={"gradients": "5 × 2 B"}))
    lines = [" ".join(line.split()) for line in found.splitlines()]
    assert lines[0] == "lora, none:" and "gradients 1.00 GB = 5 × 2 B" in lines
    assert any(line.startswith("overlap -0.50 GB") for line in lines)
    assert "total 4.00 GB on each GPU" in lines and lines[-1] == "CPU memory 2.00 GB for each GPU"
    assert "overlap" not in formula(row())


def test_the_advice_is_a_command_the_missing_flag_or_what_to_lower():
    assert advice(ROWS, 24, "python main_train.py").endswith("python main_train.py")
    assert f"{RESERVE / 1e9:g} GB of it reserved for CUDA" in advice(ROWS, 24, "x")
    assert "give --gpu_memory" in advice(ROWS, None, None)
    assert "nothing fits 0.5 GB; the least is 1.0 GB" in advice(ROWS, 0.5, None)


def test_the_json_has_every_setting_in_bytes():
    found = as_json(ROWS, ROWS[0].setting, ROWS[3])
    assert [line["total"] for line in found["settings"]] == [one.estimate.total for one in ROWS]
    assert found["own"] == {"mode": "lora", "layout": "none", "checkpointing": False}
    assert found["cheapest"]["mode"] == "qlora" and as_json(ROWS, ROWS[0].setting, None)["cheapest"] is None
