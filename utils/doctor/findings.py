"""A finding of the doctor, with code, severity, locations and remedy, and the reports made of findings."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field

from utils.data.places import RowLocations
from utils.doctor.codes import CODES, ERROR, NOTE, WARNING
from utils.runtime.errors import Problem
from utils.runtime.text import format_count, markdown_table

_RANK = {ERROR: 0, WARNING: 1, NOTE: 2}
_EXIT = {ERROR: 2, WARNING: 1, NOTE: 0}


@dataclass
class Finding:
    """One problem found.

    Attributes:
        code: a key of `finding_codes.CODES`.
        message: what is wrong, with its figures.
        places: file → lines.
        severity: `error`, `warning` or `note`; the code's own unless something else is given.
        remedy: what helps; the code's own unless something else is given.
    """

    code: str
    message: str
    places: dict[str, RowLocations] = field(default_factory=dict)
    severity: str = ""
    remedy: str = ""

    def __post_init__(self):
        self.severity = self.severity or CODES[self.code].severity
        self.remedy = self.remedy or CODES[self.code].remedy

    def line(self) -> str:
        """Formats the finding in one line, for a log."""
        where = "; ".join(f"{file}: {places}" for file, places in self.places.items())
        return f"{self.code}: {self.message}" + (f" ({where})" if where else "")

    def as_dict(self) -> dict:
        """Returns the finding as an entry of the JSON report."""
        places = [{"file": file, "count": found.count, "lines": found.lines} for file, found in self.places.items()]
        return {
            "code": self.code,
            "severity": self.severity,
            "title": CODES[self.code].title,
            "message": self.message,
            "places": places,
            "remedy": self.remedy,
        }

    def text(self) -> str:
        """Formats the finding over several lines, for a person."""
        lines = [f"{self.severity} {self.code}", f"  {self.message}"]
        lines += [f"  {file}: {places}" for file, places in self.places.items()]
        return "\n".join([*lines, f"  → {self.remedy}"])


def findings_of(problems: Iterable[Problem]) -> list[Finding]:
    """Makes a finding of each problem, with the problem's code."""
    return [Finding(problem.code, str(problem)) for problem in problems]


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """Sorts findings by severity, then by their order in the table of codes."""
    codes = list(CODES)
    return sorted(findings, key=lambda finding: (_RANK[finding.severity], codes.index(finding.code)))


def exit_code(findings: Iterable[Finding]) -> int:
    """Returns 2 with an error, 1 with a warning, else 0."""
    return max((_EXIT[finding.severity] for finding in findings), default=0)


def with_severity(findings: Iterable[Finding], severity: str) -> list[Finding]:
    return [finding for finding in findings if finding.severity == severity]


def verdict(findings: list[Finding]) -> str:
    """`"2 errors, 1 warning, 0 notes"`"""
    counts = [(len(with_severity(findings, severity)), severity) for severity in _RANK]
    return ", ".join(format_count(count, severity) for count, severity in counts)


def as_text(findings: list[Finding], examined: str) -> str:
    """Formats the report for a person, with the verdict last."""
    advice = {0: "ready to train", 1: "it will train; look at the warnings first", 2: "mend the errors first"}
    last = f"{examined}\nverdict: {verdict(findings)} – {advice[exit_code(findings)]}"
    return "\n\n".join([*(finding.text() for finding in in_order(findings)), last])


def as_json(findings: list[Finding], examined: dict) -> str:
    """Formats the report as JSON."""
    counts = {severity: len(with_severity(findings, severity)) for severity in _RANK}
    report = {
        "verdict": {0: "clean", 1: "warnings", 2: "errors"}[exit_code(findings)],
        "exit_code": exit_code(findings),
        "counts": counts,
        "examined": examined,
        "findings": [finding.as_dict() for finding in in_order(findings)],
    }
    return json.dumps(report, ensure_ascii=False, indent=2)


def catalogue() -> str:
    """Formats the page of all codes, in both languages."""
    lines = [
        "# The doctor's codes · 体检代码",
        "",
        "Written by `python -m utils.script.doctor --write_codes true` from `utils/doctor/codes.py`; a test fails",
        "when this page is stale. A severity is the usual one; the report says where it is another.",
        "",
        "由 `python -m utils.script.doctor --write_codes true` 根据 `utils/doctor/codes.py` 生成；",
        "页面过期时测试会失败。",
        "严重程度是通常情况；若有不同，以报告为准。",
        "",
        "`quick`: what `main_train.py` looks at by itself · `main_train.py` 自动检查的部分",
        "",
    ]
    header = ["code · 代码", "severity · 严重程度", "quick", "what · 含义", "remedy · 办法"]
    rows = [
        (f"`{name}`", code.severity, "✓" if code.quick else "", f"{code.title} · {code.title_zh}",
         f"{code.remedy} · {code.remedy_zh}")
        for name, code in CODES.items()
    ]  # fmt: skip
    return "\n".join([*lines, markdown_table(header, rows)]) + "\n"
