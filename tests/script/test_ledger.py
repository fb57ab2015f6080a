"""The command that shows and writes out the rows of a ledger, on runs that have learned something."""

import gzip
import json
import shutil

import pyarrow
import pyarrow.parquet
import pytest
from conftest import write_rows

from utils.run.ledger_rows import SELECTIONS, read_run_ledger
from utils.script.ledger import main, split_folder

ANSWERS = ("Paris", "brief")
PLANTED = (9, 23, 38, 44, 57)  # lines whose answer is the other one
LEARNING = [
    "--train_mode", "full", "--precision", "fp32", "--learning_rate", "0.003", "--num_train_epochs", "10",
    "--row_ledger", "true", "--seed", "1",
]  # fmt: skip


def lights():
    """60 rows of one rule, of which five are mislabelled."""
    rows = [
        {"instruction": f"{number + 10}: the light is {('red', 'green')[number % 2]}.", "output": ANSWERS[number % 2]}
        for number in range(1, 61)
    ]
    for line in PLANTED:
        rows[line - 1]["output"] = ANSWERS[1 - line % 2]
    return rows


@pytest.fixture(scope="module")
def lit(tmp_path_factory, tiny_models):
    """A run on `lights`; its data file is beside it."""
    from conftest import train_tiny

    folder = tmp_path_factory.mktemp("lit")
    data = write_rows(folder / "lights.jsonl", lights())
    return train_tiny(folder / "run", tiny_models(), data, *LEARNING)


@pytest.fixture
def own(lit, tmp_path):
    """A copy of the run whose data file can be changed."""
    data = shutil.copy(lit.parent / "lights.jsonl", tmp_path / "lights.jsonl")
    run = shutil.copytree(lit, tmp_path / "run")
    ledger = read_run_ledger(str(run))
    ledger.note.files = [str(data)]
    ledger.write(run / "row_ledger.parquet")
    return run


def lines_of(ledger, name):
    return [int(ledger.place(index).rsplit(":", 1)[1]) for index in SELECTIONS[name].pick(ledger)]


# ------------------------------------------------------------------ what is found
def test_the_worst_rows_are_those_that_were_mislabelled(lit):
    ledger = read_run_ledger(str(lit))
    assert set(lines_of(ledger, "worst")[:5]) == set(PLANTED)
    suspects = lines_of(ledger, "mislabelled")
    assert suspects and set(suspects) <= set(PLANTED)


def test_they_are_shown_with_file_line_losses_and_text(lit, capsys):
    main([str(lit), "--top", "5"])
    said = capsys.readouterr().out
    rows = lights()
    part = said[said.index("\nworst:") : said.index("\nmislabelled:")]
    for line in PLANTED:
        assert f"{lit.parent / 'lights.jsonl'}:{line}  last " in part
        assert json.dumps(rows[line - 1], ensure_ascii=False) in part
    assert "… and 55 more" in part and "steps 1 to 150" in said and "60 rows learned" in said
    assert all(f"\n{name}: " in said for name in SELECTIONS)


def test_the_rows_are_written_as_they_are_in_the_file(lit, tmp_path, capsys):
    out = tmp_path / "worst.jsonl"
    main(["--top", "3", str(lit), "--write", str(out)])
    of_file = (lit.parent / "lights.jsonl").read_text(encoding="utf-8").splitlines()
    worst = lines_of(read_run_ledger(str(lit)), "worst")[:3]
    assert out.read_text(encoding="utf-8").splitlines() == [of_file[line - 1] for line in worst]
    assert f"written: {out}, 3 rows (worst)" in capsys.readouterr().out


def test_a_checkpoint_and_the_file_itself_are_read_too(lit, capsys):
    main([str(lit / "row_ledger.parquet"), "--top", "1"])
    assert "steps 1 to 150" in capsys.readouterr().out


# ------------------------------------------------------------------ kinds of files
def test_rows_of_every_kind_of_file_are_written_out(train, tmp_path):
    rows = [{"instruction": f"{number}: 你是谁？", "output": f"{number} fox"} for number in range(8)]
    write_rows(tmp_path / "a.jsonl", rows[:2])
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(["", json.dumps(rows[2]), json.dumps(rows[3])]))
    (tmp_path / "c.json").write_text(json.dumps(rows[4:6], indent=1), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[6:]), tmp_path / "d.parquet")
    names = ("a.jsonl", "b.jsonl.gz", "c.json", "d.parquet")
    run = train("--row_ledger", "true", data=",".join(str(tmp_path / name) for name in names))
    main([str(run), "--top", "99", "--write", str(tmp_path / "out.jsonl")])
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sorted(written, key=lambda row: row["instruction"]) == rows


def test_a_value_that_json_does_not_have_is_refused(train, tmp_path, refused):
    import datetime

    rows = [{"instruction": "Hi", "output": "fox", "day": datetime.date(2026, 1, number)} for number in (1, 2)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    run = train("--row_ledger", "true", data=str(tmp_path / "rows.parquet"))
    said = refused(main, str(run), "--write", str(tmp_path / "out.jsonl"))
    assert "cannot be written as JSON" in said and not (tmp_path / "out.jsonl").exists()


def test_the_columns_that_the_rows_need_are_named(train, tmp_path, capsys):
    rows = [{"q": f"{number}: Hi", "a": "fox"} for number in range(4)]
    write_rows(tmp_path / "own.jsonl", rows)
    write_rows(tmp_path / "plain.jsonl", [{"instruction": row["q"], "output": row["a"]} for row in rows])
    columns = json.dumps({"instruction": "q", "output": "a"})
    (tmp_path / "mix.yaml").write_text(
        f"- path: {tmp_path / 'own.jsonl'}\n  columns: {columns}\n- path: {tmp_path / 'plain.jsonl'}\n"
    )
    run = train("--row_ledger", "true", data=str(tmp_path / "mix.yaml"))
    main([str(run), "--top", "99", "--write", str(tmp_path / "out.jsonl")])
    said = capsys.readouterr().out
    assert f"to train them, add --columns '{columns}'" in said
    plain = train("--row_ledger", "true", data=str(tmp_path / "plain.jsonl"), output="plain")
    main([str(plain), "--write", str(tmp_path / "out2.jsonl")])
    assert "--columns" not in capsys.readouterr().out


# ------------------------------------------------------------------ what is refused
@pytest.mark.parametrize("spelling", ["same", "relative", "link", "hard link", "validation"])
def test_a_data_file_of_the_run_is_never_written(own, tmp_path, refused, spelling):
    data = tmp_path / "lights.jsonl"
    out = {
        "same": data, "relative": tmp_path / "run" / ".." / "lights.jsonl", "link": tmp_path / "link.jsonl",
        "hard link": tmp_path / "hard.jsonl", "validation": tmp_path / "eval.jsonl",
    }[spelling]  # fmt: skip
    if spelling == "link":
        out.symlink_to(data)
    elif spelling == "hard link":
        out.hardlink_to(data)
    elif spelling == "validation":
        out.write_text("{}")
        record = json.loads((own / "train_args.json").read_text(encoding="utf-8"))
        record["data"]["eval"] = {"files": [{"file": str(out)}]}
        (own / "train_args.json").write_text(json.dumps(record), encoding="utf-8")
    before = out.read_bytes()
    for overwrite in ("true", "false"):
        said = refused(main, str(own), "--write", str(out), "--overwrite", overwrite)
        assert "is a data file of the run" in said
    assert out.read_bytes() == before


def test_a_list_that_was_not_looked_for_is_not_written(train, tmp_path, refused, capsys):
    run = train("--row_ledger", "true", "--learning_rate", "1e-9", "--num_train_epochs", "2")
    main([str(run)])
    said = capsys.readouterr().out
    assert "Not looked for: only 0 of " in said and "train longer" in said
    out = tmp_path / "out.jsonl"
    said = refused(main, str(run), "--which", "mislabelled", "--write", str(out))
    assert "mislabelled rows are not looked for: only 0 of " in said and not out.exists()


def test_a_changed_file_is_shown_without_texts_and_not_written_out(own, tmp_path, refused, capsys):
    data = tmp_path / "lights.jsonl"
    data.write_text(data.read_text(encoding="utf-8").replace("brief", "Brief"), encoding="utf-8")
    main([str(own), "--top", "2"])
    said = capsys.readouterr().out
    assert f"{data} was changed since the run read it" in said and "instruction" not in said and f"{data}:" in said
    said = refused(main, str(own), "--write", str(tmp_path / "out.jsonl"))
    assert "was changed since the run read it" in said and not (tmp_path / "out.jsonl").exists()
    data.unlink()
    assert "cannot be read" in refused(main, str(own), "--write", str(tmp_path / "out.jsonl"))


def test_all_that_is_wrong_is_said_at_once(lit, tmp_path, refused):
    (tmp_path / "there.jsonl").write_text("")
    said = refused(main, str(tmp_path), "--top", "0", "--write", str(tmp_path / "there.jsonl"), "--which", "best")
    assert all(part in said for part in ("--top 0", "there.jsonl' exists", "holds no row_ledger.parquet", "--which"))
    assert "is not a .jsonl" in refused(main, str(lit), "--write", "out.json")
    assert "existing folder" in refused(main, str(lit), "--write", str(tmp_path / "none" / "out.jsonl"))
    assert "0 folders are given" in refused(main)
    assert "2 folders are given" in refused(main, str(lit), str(lit))
    assert "does not exist" in refused(main, str(lit) + "x")
    (tmp_path / "row_ledger.parquet").write_text("no")
    assert "cannot be read as a row ledger" in refused(main, str(tmp_path))


def test_folders_and_flags_come_in_any_order():
    assert split_folder(["a", "--top", "5", "--overwrite=true", "b"]) == (
        ["a", "b"],
        ["--top", "5", "--overwrite=true"],
    )
