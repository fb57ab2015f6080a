"""Text-similarity metrics of answers and references; every score is from 0 to 100.

| name | definition |
|---|---|
| `exact` | equal after stripping white space at both ends |
| `normalised` | equal after Unicode NFKC, lower-casing, and stripping quotes and closing punctuation |
| `bleu` | n-grams of words or Chinese characters up to 4 (Papineni et al. 2002), by sacrebleu |
| `chrf` | n-grams of characters up to 6 (Popović 2015), by sacrebleu |
| `rouge_l` | F1 of the longest common subsequence (Lin 2004), by rouge-score |

BLEU and chrF of a file count n-grams over all its rows; the other scores are means over the rows.
"""

import importlib.util
import re
import unicodedata
from functools import cache
from typing import NamedTuple

from utils.runtime.errors import nearest

# name → the package that computes it
METRICS = {"exact": None, "normalised": None, "bleu": "sacrebleu", "chrf": "sacrebleu", "rouge_l": "rouge_score"}
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# a word in Latin letters has four to five of them: at this share about half of the words are Chinese characters
_CHINESE_FROM = 0.2
_BLEU_LABELS = {"13a": "BLEU, by word (13a)", "zh": "BLEU, Chinese by character (zh)"}


class Figure(NamedTuple):
    """One figure of a file.

    Attributes:
        key: its name in JSON.
        label: its name in a table, with the tokenization.
        rows: how many rows it was computed from.
        value: 0 to 100.
        error: its standard error, if it has one.
    """

    key: str
    label: str
    rows: int
    value: float
    error: float | None = None


def check_metrics(text: str) -> tuple[list[str], list[str]]:
    """Reads `--metrics`, and checks that the packages they need are installed.

    Returns:
        the names, each once, in the order of `METRICS`; and the problems.
    """
    given = [name.strip() for name in text.split(",") if name.strip()]
    allowed = ", ".join(METRICS)
    problems = [
        f"--metrics {name!r} is not a metric.{nearest(name, METRICS)} Allowed, separated by commas: {allowed}"
        for name in given
        if name not in METRICS
    ]
    if not given:
        problems.append(f"--metrics is empty; give some of {allowed}, separated by commas")
    names = [name for name in METRICS if name in given]
    for package in sorted({METRICS[name] for name in names} - {None}):
        if importlib.util.find_spec(package) is None:
            wanted = ",".join(name for name in names if METRICS[name] == package)
            problems.append(
                f"--metrics {wanted} needs the package {package.replace('_', '-')}, which is not installed; "
                "pip install -r requirements.txt, or leave these metrics out"
            )
    return names, problems


def tokenization_for(text: str) -> str:
    """The tokenization of sacrebleu for a text, by the share of Chinese characters among its letters and digits.

    `"法国的首都是巴黎。"` → `"zh"`, `"Paris, 巴黎 in Chinese"` → `"13a"`
    """
    letters = sum(character.isalnum() for character in text)
    return "zh" if letters and len(re.findall(f"[{_HAN}]", text)) >= _CHINESE_FROM * letters else "13a"


class Words:
    """A tokenizer for rouge-score: words in lower case, and Chinese characters one by one.

    The default one keeps only a-z and 0-9, so that a Chinese answer would have no words. On ASCII both agree.
    """

    def tokenize(self, text: str) -> list[str]:
        """`"我是 Dojo." → ["我", "是", "dojo"]`; a text without words is split at white space."""
        return re.findall(f"[{_HAN}]|[^\\W_{_HAN}]+", text.lower()) or text.split()


def normalised(text: str) -> str:
    """`' “PARIS”。 '` → `'paris'`"""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    quotes = "\"'“”‘’「」『』 "
    # only closing punctuation: a minus or a point before a number has a meaning
    return text.strip(quotes).rstrip(".!?,;:。、" + quotes) or text


def score_row(answer: str, reference: str, metrics: list[str]) -> dict[str, float]:
    """The scores of one answer.

    Args:
        answer: of the model.
        reference: the right answer; it decides the tokenization of BLEU.
        metrics: names of `METRICS`.
    """
    functions = {
        "exact": lambda: 100.0 * (answer.strip() == reference.strip()),
        "normalised": lambda: 100.0 * (normalised(answer) == normalised(reference)),
        "bleu": lambda: _bleu(tokenization_for(reference)).sentence_score(answer, [reference]).score,
        "chrf": lambda: _chrf().sentence_score(answer, [reference]).score,
        "rouge_l": lambda: 100.0 * _rouge().score(reference, answer)["rougeL"].fmeasure,
    }
    return {name: round(float(functions[name]()), 4) for name in metrics}


def score_file(answers: list[str], references: list[str], rows: list[dict[str, float]]) -> list[Figure]:
    """The figures of a file, with a BLEU for each tokenization.

    Args:
        answers: one for each row.
        references: one for each row.
        rows: the scores of each row, from `score_row`.
    """
    labels = {"exact": "exact match", "normalised": "exact match, normalised", "chrf": "chrF",
              "rouge_l": "ROUGE-L, F1"}  # fmt: skip
    count, figures = len(rows), []
    for name in rows[0]:
        if name == "bleu":
            figures += _bleu_of_file(answers, references)
        elif name == "chrf":
            figures.append(Figure(name, labels[name], count, _chrf().corpus_score(answers, [references]).score))
        else:
            figures.append(Figure(name, labels[name], count, sum(row[name] for row in rows) / count))
    return figures


def _bleu_of_file(answers: list[str], references: list[str]) -> list[Figure]:
    figures = []
    for name, label in _BLEU_LABELS.items():
        places = [place for place, reference in enumerate(references) if tokenization_for(reference) == name]
        if places:
            pair = [answers[place] for place in places], [[references[place] for place in places]]
            figures.append(Figure(f"bleu_{name}", label, len(places), _bleu(name).corpus_score(*pair).score))
    return figures


def signatures(metrics: list[str]) -> dict[str, str]:
    """The signatures of sacrebleu's metrics, after at least one score was computed."""
    named = {f"bleu_{name}": _bleu(name) for name in _BLEU_LABELS} if "bleu" in metrics else {}
    named |= {"chrf": _chrf()} if "chrf" in metrics else {}
    return {
        name: metric.get_signature().format() for name, metric in named.items() if getattr(metric, "num_refs", -1) != -1
    }


@cache
def _bleu(tokenization: str):
    from sacrebleu.metrics import BLEU

    # effective_order: if no answer has four words, lower orders are used, so that a perfect answer is not 0; any longer
    # answer in the file makes it ordinary BLEU. force: no warning about texts that end in " ."
    return BLEU(tokenize=tokenization, effective_order=True, force=True)


@cache
def _chrf():
    from sacrebleu.metrics import CHRF

    return CHRF()


@cache
def _rouge():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=Words())
