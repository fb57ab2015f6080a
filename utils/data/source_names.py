"""Names the sources of rows: the entries of a data flag, by which losses are split."""

from pathlib import Path

from utils.data.files import find_files
from utils.data.json_rows import COMPRESSIONS


def name_sources(paths: str, flag: str, suffixes: tuple[str, ...], files: list[str]) -> tuple[str, ...]:
    """Returns the name of the entry that each file comes from.

    `name_sources("data/a.jsonl,more/", …, ["data/a.jsonl", "more/b.csv", "more/c.csv"])` → `("a", "more", "more")`

    Args:
        paths: files, folders and globs, separated by commas, as given to `flag`.
        flag: `--train_data_path` or `--eval_data_path`.
        suffixes: the kinds of file the task reads.
        files: the files of all entries, in the order of their indices.
    """
    entries = list(dict.fromkeys(part.strip() for part in paths.split(",") if part.strip()))
    names = dict(zip(entries, short_names(entries), strict=True))
    entry_of: dict[str, str] = {}
    for entry in entries:
        for file in find_files(entry, flag, suffixes)[0]:
            entry_of.setdefault(file, entry)
    return tuple(names[entry_of[file]] for file in files)


def short_names(entries: list[str]) -> list[str]:
    """The last part of each path without its suffix; where two would be the same, the shortest ends that differ.

    `["x/maths.jsonl.gz", "code.csv"]` → `["maths", "code"]`; `["/d/x/rows.jsonl", "/d/y/rows.jsonl"]` → `["x/rows",
    "y/rows"]`; `["a.csv", "a.jsonl"]` → these names.
    """
    paths = [Path(entry) for entry in entries]
    forms = [[_stem(path) for path in paths], [path.name for path in paths]]
    for parts in range(2, max((len(path.parts) for path in paths), default=0) + 1):
        ends = [Path(*path.parts[-parts:]) for path in paths]
        forms += [[(end.parent / _stem(end)).as_posix() for end in ends], [end.as_posix() for end in ends]]
    forms.append(entries)
    names = []
    for number, stem in enumerate(forms[0]):
        alike = [other for other, name in enumerate(forms[0]) if name == stem]
        differ = (form for form in forms if len({form[other] for other in alike}) == len(alike))
        names.append(next(differ, entries)[number])
    return names


def _stem(path: Path) -> str:
    path = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return path.stem or path.name
