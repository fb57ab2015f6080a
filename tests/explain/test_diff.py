"""What differs from the record of an earlier run."""

import json

import tiny
from conftest import write_rows
from explaining import printed


def test_the_differences_from_an_earlier_run(train, capsys, tmp_path, rows_file, tiny_models):
    run = train("--max_steps", "2", "--card_samples", "0", output="then")
    again = ["--config", str(run), "--diff", str(run)]
    assert "nothing differs" in printed(capsys, *again)
    record = json.loads((run / "train_args.json").read_text())
    record["versions"]["trl"], record["hardware"]["gpus"] = "0.0.1", ["A GPU"]
    (run / "train_args.json").write_text(json.dumps(record))
    write_rows(tmp_path / "rows.jsonl", tiny.ROWS[:5])
    text = printed(capsys, *again, "--learning_rate", "1e-5", "--max_steps", "3", "--processes", "2")
    reported = text[text.index("Compared with") :]
    for part in ("learning_rate", "0.002 → 1e-05", "--learning_rate 1e-5", "trl version", "0.0.1 → ", "A GPU → none",
                 "sha256 of the train data", "processes", "1 → 2", "updates", "2 → 3"):  # fmt: skip
        assert part in reported, part
    found = json.loads(printed(capsys, *again, "--seed", "7", "--json", "true"))["diff"]["differs"]
    assert found["seed"] == {"then": "42", "now": "7", "from": "--seed 7"}
