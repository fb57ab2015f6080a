"""Tables in READMEs that are made from results: each stands between its mark and the end mark."""

from pathlib import Path

END = "<!-- end of table -->"


def mark(name: str) -> str:
    """The line after which the table made from `name`, `benchmarks/dpo.json` say, stands."""
    return f"<!-- table: {name} -->"


def write_table(page: Path, name: str, table: str) -> None:
    """Puts a table where its mark stands; a page without the mark is left as it is."""
    before, found, rest = page.read_text(encoding="utf-8").partition(mark(name))
    if found:
        page.write_text(f"{before}{found}\n\n{table}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def table_in(page: Path, name: str) -> str:
    """The table made from `name` as it stands on a page."""
    return page.read_text(encoding="utf-8").partition(mark(name))[2].partition(END)[0].strip()
