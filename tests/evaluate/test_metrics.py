"""Scores against values worked out by hand, and against the libraries called by themselves."""

import importlib.util

import pytest

from utils.evaluate import metrics
from utils.evaluate.metrics import (
    METRICS,
    Words,
    check_metrics,
    normalised,
    score_file,
    score_row,
    signatures,
    tokenization_for,
)

ALL = list(METRICS)


@pytest.mark.parametrize("text", [
    "Paris", "The capital of France is Paris.", "法国的首都是巴黎。", "我是 Dojo，LLM-Dojo 的小语言模型。",
    "+", "？", "-3",
])  # fmt: skip
def test_a_perfect_answer_has_100_and_an_empty_one_0(text):
    assert score_row(text, text, ALL) == dict.fromkeys(ALL, 100)
    assert score_row("", text, ALL) == dict.fromkeys(ALL, 0)
    for answer, score in ((text, 100), ("", 0)):
        figures = score_file([answer] * 2, [text] * 2, [score_row(answer, text, ALL)] * 2)
        assert [round(figure.value, 6) for figure in figures] == [score] * len(ALL)


def test_english_by_hand():
    scores = score_row("the cat", "the cat sat on the mat", ALL)
    # both n-gram orders there are match; the brevity penalty is exp(1 - 6/2)
    assert scores["bleu"] == pytest.approx(13.5335, abs=1e-4)
    # 2 words in common: precision 1, recall 1/3
    assert scores["rouge_l"] == 50
    assert scores["exact"] == scores["normalised"] == 0


def test_chrf_by_hand():
    # one character: 2 of 2 and 2 of 3; two: 1 of 1 and 1 of 2; means 1 and 7/12; F2 = 5PR / (4P + R)
    assert score_row("ab", "abc", ["chrf"])["chrf"] == pytest.approx(100 * 5 * 7 / 12 / (4 + 7 / 12), abs=1e-3)


def test_chinese_by_character_by_hand():
    scores = score_row("法国的首都是伦敦。", "法国的首都是巴黎。", ALL)
    # of 9 characters 7 match, of 8 pairs 5, of 7 triples 4, of 6 fours 3
    assert scores["bleu"] == pytest.approx(100 * (7 / 9 * 5 / 8 * 4 / 7 * 3 / 6) ** 0.25, abs=1e-4)
    assert scores["rouge_l"] == 75  # 6 of 8 characters, the full stop aside


def test_mixed_text():
    assert Words().tokenize("我是 Dojo，LLM-Dojo 的。") == ["我", "是", "dojo", "llm", "dojo", "的"]
    # 我 是 他 (3) against 我 是 dojo 的 (4), 2 in common: F1 = 2 · 2 / (3 + 4)
    assert score_row("我是他。", "我是 Dojo 的。", ["rouge_l"])["rouge_l"] == pytest.approx(100 * 4 / 7, abs=1e-4)


@pytest.mark.parametrize(("text", "cut"), [
    ("法国的首都是巴黎。", "zh"), ("我是 Dojo，LLM-Dojo 的小语言模型。", "zh"), ("“雪”的英文是 snow。", "zh"),
    ("The Chinese word for cat is 猫.", "13a"), ("Paris", "13a"), ("", "13a"), ("。", "13a"), ("Größe", "13a"),
])  # fmt: skip
def test_how_a_text_is_cut_is_told_by_the_text(text, cut):
    assert tokenization_for(text) == cut


def test_a_file_equals_the_libraries_at_their_standard_settings():
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu, corpus_chrf

    english = [("The cat sat on the mat today.", "A cat sat on the mat."), ("It's 12.5 %, “so”.", "It is 12.5%, so.")]
    chinese = [("今天天气很好，我们去公园。", "今天天气真好，我们去了公园。"), ("我有一只猫。", "我有两只小猫和狗。")]
    pairs = [english[0], chinese[0], english[1], chinese[1]]
    answers, references = map(list, zip(*pairs, strict=True))
    rows = [score_row(answer, reference, ALL) for answer, reference in pairs]
    figures = {figure.key: figure for figure in score_file(answers, references, rows)}
    for key, part in (("bleu_13a", english), ("bleu_zh", chinese)):
        said, wanted = map(list, zip(*part, strict=True))
        assert figures[key].value == corpus_bleu(said, [wanted], tokenize=key.removeprefix("bleu_")).score > 10
        assert figures[key].rows == 2
    assert figures["chrf"].value == corpus_chrf(answers, [references]).score
    assert figures["chrf"].rows == figures["rouge_l"].rows == 4
    library = RougeScorer(["rougeL"])
    for (answer, reference), row in zip(english, (rows[0], rows[2]), strict=True):
        assert row["rouge_l"] == pytest.approx(100 * library.score(reference, answer)["rougeL"].fmeasure, abs=1e-4)
    assert "by character" in figures["bleu_zh"].label and "by word" in figures["bleu_13a"].label
    told = signatures(ALL)
    assert "tok:zh" in told["bleu_zh"] and "tok:13a" in told["bleu_13a"] and "nc:6" in told["chrf"]


def test_a_file_of_one_language_has_one_bleu():
    keys = [figure.key for figure in score_file(["好"], ["好的"], [score_row("好", "好的", ["bleu", "exact"])])]
    assert keys == ["bleu_zh", "exact"]


@pytest.mark.parametrize(("pairs", "told"), [
    ([("The cat.", "A cat.")], {"bleu_13a", "chrf"}),
    ([("今天天气好", "天气很好")], {"bleu_zh", "chrf"}),
    ([("The cat.", "A cat."), ("今天天气好", "天气很好")], {"bleu_13a", "bleu_zh", "chrf"}),
    ([("", "A cat.")], {"bleu_13a", "chrf"}),
    ([("", "")], {"bleu_13a", "chrf"}),
    ([("A cat.", "")], {"bleu_13a", "chrf"}),
])  # fmt: skip
def test_the_settings_are_told_of_the_scores_that_were_computed(pairs, told):
    """In a process that computed nothing before: a BLEU of sacrebleu has no `num_refs` until it is used."""
    for cached in (metrics._bleu, metrics._chrf, metrics._rouge):
        cached.cache_clear()
    rows = [score_row(answer, reference, ALL) for answer, reference in pairs]
    figures = score_file([pair[0] for pair in pairs], [pair[1] for pair in pairs], rows)
    assert all(0 <= figure.value <= 100 for figure in figures)
    assert set(signatures(ALL)) == told


def test_exact_forgives_spaces_at_the_ends_and_normalised_more():
    exact = [score_row(answer, "Paris is big.", ["exact"])["exact"] for answer in (" Paris is big.\n", "paris is big.")]
    assert exact == [100, 0]
    for answer in ("“PARIS is\n big”", "Paris  is big!", "Ｐaris is big。"):
        assert normalised(answer) == normalised("Paris is big.") == "paris is big"
    assert normalised("-3") != normalised("3") and normalised(".5") != normalised("5")


def test_what_is_refused(monkeypatch):
    assert check_metrics("rouge_l, exact,exact") == (["exact", "rouge_l"], [])
    said = check_metrics("blue")[1][0]
    assert "'blue'" in said and "Did you mean 'bleu'" in said and "rouge_l" in said
    assert "is empty" in check_metrics(" ,")[1][0]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = "\n".join(metrics.check_metrics("exact,chrf,bleu,rouge_l")[1])
    assert "bleu,chrf needs the package sacrebleu" in said and "package rouge-score" in said and "pip install" in said
    assert not check_metrics("exact,normalised")[1]
