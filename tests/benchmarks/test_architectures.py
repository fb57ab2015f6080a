"""benchmarks/architectures: its pages say what its results hold, and a stopped run loses nothing."""

import json
import re

import pytest
import torch
from conftest import ROOT

from benchmarks import architectures, architectures_table
from benchmarks.architectures_table import families_table, is_right, kind_of, page
from benchmarks.architectures_work import gradient_difference, problems_of
from benchmarks.tables import table_in

RESULTS = json.loads(architectures.RESULTS.read_text(encoding="utf-8"))


RIGHT = {
    "layout": "padded", "loss": 8.0, "plain_loss": 8.0001, "eval_loss": 7.0, "plain_eval_loss": 7.0001,
    "padded_loss": 8.0, "gradient": 1e-6, "moved": 0.1, "reloaded": 1e-6, "merged": 1e-6, "generates": {},
}  # fmt: skip


def test_the_pages_are_those_of_the_results():
    assert architectures_table.PAGE.read_text(encoding="utf-8") == page(RESULTS, architectures.UNTRIED)
    assert table_in(architectures_table.MODELS, architectures_table.NAME) == families_table(RESULTS)


def test_nothing_is_silently_different():
    assert [line["architecture"] for line in RESULTS["models"] if not is_right(line)] == []


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"loss": 8.01}, "the first step's loss is 8.01"),
        ({"padded_loss": float("nan")}, "padded rows is nan"),
        ({"eval_loss": 7.01}, "the saved weights is 7.01"),
        ({"gradient": float("inf")}, "gradients of the first step differ from those of plain transformers by inf"),
        ({"reloaded": 1e-3}, "reloaded model differ"),
        ({"merged": 1e-3}, "merged model differ"),
        ({"moved": 1e-6}, "has changed the logits by 1e-06 only"),
        ({"generates": {"plain": ["a"], "infer": ["b"]}}, "infer answers ['b'], plain transformers ['a']"),
    ],
)
def test_every_difference_is_a_problem(changed, problem):
    assert problems_of(RIGHT) == []
    found = RIGHT | changed
    (message,) = problems_of(found)
    assert problem in message
    assert kind_of(found | {"problems": [message]}) == "wrong" != kind_of(RIGHT | {"problems": []})


def test_a_refused_merge_is_no_problem_and_is_on_the_page():
    found = RIGHT | {"merged": "the layers share their weights"}
    assert problems_of(found) == []
    assert architectures_table.cell(found | {"problems": []}) == (
        "works padded; merging is refused: the layers share their weights"
    )


def test_a_weight_without_a_gradient_counts_unless_the_others_is_zero():
    one, zero = torch.ones(2), torch.zeros(2)
    assert gradient_difference({"a": one, "b": zero}, {"a": one}) == 0
    assert gradient_difference({"a": one}, {"a": one, "b": one}) == float("inf")
    assert gradient_difference({"a": 2 * one}, {"a": one}) == 1


@pytest.mark.parametrize("page", ["README.md", "README_zh.md"])
def test_the_readmes_have_the_counts(page):
    built = [line for line in RESULTS["models"] if "not_built" not in line]
    refused = sum("refused" in line["full"] for line in built)
    text = (ROOT / page).read_text(encoding="utf-8")
    paragraph = text.partition("(benchmarks/architectures.md)")[2].partition("\n\n")[0]
    counts = [len(RESULTS["models"]), len(built), len(built) - refused, refused]
    assert sorted(map(int, re.findall(r"\d+", paragraph))) == sorted(counts)


def test_what_was_found_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(architectures, "RESULTS", tmp_path / "architectures.json")
    monkeypatch.setattr(architectures, "write_pages", lambda results: None)
    kinds = ["qwen2", "llama"]
    results = architectures.results_so_far(kinds, keep=True)
    results["models"][0] = {"architecture": "llama", "not_built": "took too long", "seconds": 1.0}
    architectures.write(results)
    assert architectures.results_so_far(kinds, keep=True) == results
    untried = [{"architecture": kind, "not_built": architectures.UNTRIED} for kind in sorted(kinds)]
    assert architectures.results_so_far(kinds, keep=False)["models"] == untried
    (tmp_path / "architectures.json").write_text(json.dumps({**results, "versions": {"torch": "1.0"}}))
    with pytest.raises(ValueError, match="run all again"):
        architectures.results_so_far(kinds, keep=True)
