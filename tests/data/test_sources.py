"""The sources of `--train_data_path`: weights after a colon, and the settings of a YAML file, checked all at once."""

from types import SimpleNamespace

import pytest
from conftest import write_rows

from utils.data.sources import Source, has_weights, is_mixture, plain_paths, read_sources, source_files

ROW = {"instruction": "1", "output": "2"}


@pytest.fixture
def mix(tmp_path, monkeypatch):
    """`mix(text)` → the sources and the problems of a YAML file."""
    monkeypatch.chdir(tmp_path)

    def read(text):
        (tmp_path / "mix.yaml").write_text(text, encoding="utf-8")
        return read_sources("mix.yaml")

    return read


def test_weights_follow_the_last_colon():
    sources, problems = read_sources("x/a.jsonl:0.7, b.parquet:3")
    assert sources == [Source("x/a.jsonl", "a", 0.7), Source("b.parquet", "b", 3.0)] and not problems
    assert has_weights("a.jsonl,b.jsonl:2") and not has_weights("a.jsonl,b:c.jsonl") and not has_weights("m.yaml")
    assert plain_paths("x/a.jsonl:0.7, b/:3") == "x/a.jsonl,b/"


def test_a_path_with_a_colon_of_its_own_still_works(tmp_path):
    for name in ("a:1", "b:2.jsonl"):
        write_rows(tmp_path / name, [ROW])
    assert not has_weights(f"{tmp_path / 'a:1'},{tmp_path / 'b:2.jsonl'}")
    sources, _ = read_sources(f"{tmp_path / 'a:1'}:0.5")
    assert (sources[0].path, sources[0].weight) == (str(tmp_path / "a:1"), 0.5)


@pytest.mark.parametrize("paths", ["a.jsonl:0,b.jsonl:1", "a.jsonl:-1,b.jsonl:1", "a.jsonl:nan,b.jsonl:1",
                                   "a.jsonl:inf,b.jsonl:1", "a.jsonl,b.jsonl:1"])  # fmt: skip
def test_each_weight_is_a_number_above_zero_and_each_source_has_one(paths):
    (problem,) = read_sources(paths)[1]
    assert problem.flags == ("train_data_path",)


def test_a_list_is_a_mixture_only_with_weights_or_a_strategy():
    def args(path, strategy=None):
        return SimpleNamespace(train_data_path=path, mixing_strategy=strategy)

    assert not is_mixture(args("a.jsonl,b.jsonl")) and not is_mixture(args(None)) and not is_mixture(args(""))
    assert is_mixture(args("a.jsonl:1")) and is_mixture(args("mix.yml")) and is_mixture(args("a,b", "interleave"))


def test_every_setting_of_the_file_is_read(mix):
    sources, problems = mix(
        "- path: a.jsonl\n  name: first\n  weight: 2\n  rows: 30\n  repeat: 0.5\n  columns: {output: antwort}\n"
        "  system: Be brief.\n  template_args: {enable_thinking: false}\n- {path: b.jsonl, weight: 1}\n"
    )
    first = Source("a.jsonl", "first", 2.0, 30, 0.5, '{"output": "antwort"}', "Be brief.", {"enable_thinking": False})
    assert sources == [first, Source("b.jsonl", "b", 1.0)] and not problems


def test_all_problems_come_at_once_with_their_lines(mix):
    _, problems = mix(
        "- path: a.jsonl\n  wieght: 1\n  rows: 1.5\n- name: b\n  repeat: 0\n- 7\n"
        "- path: c\n  path: d\n  columns: [e]\n  template_args: f\n  system: 5\n  weight: true\n"
    )
    assert [problem.line for problem in problems] == [2, 3, 5, 4, 6, 8, 9, 10, 11, 12]
    assert "'weight'" in str(problems[0])  # the nearest name


@pytest.mark.parametrize("setting", [
    "name: 2024-99-99", f"rows: 1{'0' * 400}", f"rows: 1{'0' * 5000}", f"rows: 0x1{'0' * 5000}",
    f"repeat: 1{'0' * 400}", f"template_args: {{a: 0x1{'0' * 5000}}}", "weight: !!bool x", "weight: !!timestamp x",
    "weight: 0b_", 'name: "a\\nb"', "name: 'a\n\n    b'", 'name: "a\\x1b[31m"', 'name: "a\\u2028b"', 'path: "a\\0"',
], ids=lambda setting: setting[:20])  # fmt: skip
def test_a_value_that_cannot_be_used_is_refused_by_its_line(mix, setting):
    text = f"- system: 'two\n\n    lines'\n  {setting}\n"
    _, problems = mix(text if "path:" in setting else f"{text}  path: a.jsonl\n")
    assert [problem.line for problem in problems] == [4] and len(str(problems[0])) < 200


@pytest.mark.parametrize(
    "text", [f"- path: a\n  columns: {'[' * 3000 + ']' * 3000}", "", "a: [", "path: a.jsonl", "[]", "5"]
)
def test_a_file_without_a_list_is_refused(mix, text):
    sources, problems = mix(text)
    assert not sources and len(problems) == 1


def test_a_missing_file_is_refused():
    assert len(read_sources("nowhere.yaml")[1]) == 1


def test_names_are_each_others_own(mix):
    assert len(mix("- {path: a.jsonl, name: x}\n- {path: b.jsonl, name: x}\n")[1]) == 1


def test_a_file_belongs_to_one_source(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        write_rows(tmp_path / name, [ROW])
    sources, _ = read_sources(f"{tmp_path}:1,{tmp_path / 'a.jsonl'}:2")
    files, (problem,) = source_files(sources, (".jsonl",))
    assert [len(found) for found in files] == [2, 1] and "a.jsonl" in str(problem)
    twice, _ = read_sources(f"{tmp_path / 'a.jsonl'}:1,{tmp_path / 'a.jsonl'}:2")
    assert source_files(twice, (".jsonl",))[1]
