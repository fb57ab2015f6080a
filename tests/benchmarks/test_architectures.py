"""benchmarks/architectures: its pages say what its results hold, and a stopped run loses nothing."""

import json
import re

import pytest
from conftest import ROOT

from benchmarks import architectures

RESULTS = json.loads(architectures.RESULTS.read_text(encoding="utf-8"))


def test_the_page_is_that_of_the_results():
    assert architectures.RESULTS.with_suffix(".md").read_text(encoding="utf-8") == architectures.table(RESULTS)


def test_nothing_is_silently_different():
    assert [line["architecture"] for line in RESULTS["models"] if not architectures.is_right(line)] == []


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
