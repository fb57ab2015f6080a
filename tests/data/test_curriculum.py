"""`--curriculum`: rows by length or by a number of the raw rows, easy first."""

import numpy
import pytest
from conftest import write_rows

from utils.args import parse_args
from utils.runtime.errors import UserError
from utils.tasks import get_task
from utils.template import get_template

ROWS = [{"instruction": "q", "output": "word " * (1 + i * 7 % 10), "hard": (i * 3) % 4} for i in range(12)]


@pytest.fixture
def load(tiny_models, tmp_path, tokenizer):
    """Prepares the rows of files as main_train.py does; returns the task's Data."""

    def run(*flags, files=(ROWS,)):
        paths = ",".join(write_rows(tmp_path / f"{number}.jsonl", rows) for number, rows in enumerate(files))
        folders = ["--output_dir", str(tmp_path / "run"), "--cache_dir", str(tmp_path / "cache")]
        args, train_args = parse_args(
            ["--model_name_or_path", tiny_models(), "--train_data_path", paths, *folders, *flags]
        )
        return get_task("sft").load_datasets(args, train_args, get_template("qwen"), tokenizer)

    return run


def test_by_length(load):
    data = load("--curriculum", "length")
    lengths = numpy.array([len(ids) for ids in data.train["input_ids"]])
    order = data.order.indices(0)
    assert sorted(order) == list(range(12)) and (numpy.diff(lengths[order]) >= 0).all()
    assert list(order) == list(data.order.indices(1)) and data.rows_in_epoch() == 12


def test_by_a_column_with_ties_in_the_order_of_the_seed(load):
    dropped = {"instruction": "empty", "output": "", "hard": -5}
    rows = [*ROWS[:6], dropped, *ROWS[6:]]
    orders = []
    for seed in ("42", "7"):
        data = load("--curriculum", "column:hard", "--seed", seed, files=(rows[:8], rows[8:]))
        hard = numpy.array([(i * 3) % 4 for i in range(12)])
        assert (numpy.diff(hard[data.order.indices(0)]) >= 0).all()
        orders.append(list(data.order.indices(0)))
    assert orders[0] != orders[1]


@pytest.mark.parametrize("value", ["a text", None, True, [1], float("nan")])
def test_a_row_without_a_number_is_refused_by_its_line(load, value):
    rows = [*ROWS[:4], {**ROWS[4], "hard": value}, *ROWS[5:]]
    with pytest.raises(UserError) as error:
        load("--curriculum", "column:hard", files=(rows,))
    assert "line 5" in str(error.value) and "1 of 12" in str(error.value)
    with pytest.raises(UserError) as error:
        load("--curriculum", "column:hrad")
    assert "12 of 12" in str(error.value)
