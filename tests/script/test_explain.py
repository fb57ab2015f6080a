"""The command `explain`: its own flags."""

from utils.script.explain import main


def test_all_problems_are_printed_at_once(refused, tmp_path):
    said = refused(
        main, "--processes", "2000", "--diff", "nowhere", "--lerning_rate", "1", "--max_len", "1", "--all", "x"
    )
    assert said.startswith("5 errors")
    for part in ("--processes 2000", "--diff 'nowhere' is not a file", "--lerning_rate", "--max_len 1", "--all"):
        assert part in said
    flags = tmp_path / "flags.json"
    flags.write_text('{"seed": 3}')
    assert "holds flags, not a run" in refused(main, "--diff", str(flags))
