"""`--curriculum`: rows by length or by a number of the raw rows, easy first."""

from decimal import Decimal

import numpy
import pyarrow.parquet
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
        return prepare(tiny_models, tmp_path, tokenizer, paths, *flags)

    return run


def prepare(tiny_models, tmp_path, tokenizer, paths, *flags):
    folders = ["--output_dir", str(tmp_path / "run"), "--cache_dir", str(tmp_path / "cache")]
    args, train_args = parse_args(["--model_name_or_path", tiny_models(), "--train_data_path", paths, *folders, *flags])
    return get_task("sft").load_datasets(args, train_args, get_template("qwen"), tokenizer)


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


def test_texts_of_csv_and_decimals_of_parquet_are_numbers(tiny_models, tmp_path, tokenizer):
    hard = [10.0, 9.5, -3.0, 200.0]
    rows = [{"instruction": f"q{i}", "output": "a", "hard": value} for i, value in enumerate(hard)]
    text = "".join(f"{row['instruction']},{row['output']}, {row['hard']}\n" for row in rows)
    (tmp_path / "rows.csv").write_text("instruction,output,hard\n" + text)
    table = pyarrow.Table.from_pylist([{**row, "hard": Decimal(str(row["hard"]))} for row in rows])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    for name in ("rows.csv", "rows.parquet"):
        data = prepare(tiny_models, tmp_path, tokenizer, str(tmp_path / name), "--curriculum", "column:hard")
        assert list(data.order.indices(0)) == [2, 1, 0, 3]
        assert data.report.unread == {}
    other = prepare(tiny_models, tmp_path, tokenizer, str(tmp_path / "rows.csv"))  # the same prepared rows
    assert list(other.report.unread.values()) == [{"hard": 4}]


def test_the_checkpoint_has_a_hash_of_the_order(load):
    seed = ["--data_seed", "-5"]  # torch takes negative seeds
    found = [load("--curriculum", "column:hard", *seed, files=(rows,)).order
             for rows in (ROWS, ROWS, [{**row, "hard": -row["hard"]} for row in ROWS])]  # fmt: skip
    assert found[0].fingerprint == found[1].fingerprint != found[2].fingerprint
    assert {order.name for order in found} == {"--curriculum column:hard"}


@pytest.mark.parametrize("value", ["a text", "nan", "1_000", "", 10**400, None, True, [1], float("nan")])
def test_a_row_without_a_number_is_refused_by_its_line(load, value):
    rows = [*ROWS[:4], {**ROWS[4], "hard": value}, *ROWS[5:]]
    with pytest.raises(UserError) as error:
        load("--curriculum", "column:hard", files=(rows,))
    assert "line 5" in str(error.value) and "1 of 12" in str(error.value)
    with pytest.raises(UserError) as error:
        load("--curriculum", "column:hrad")
    assert "12 of 12" in str(error.value)
