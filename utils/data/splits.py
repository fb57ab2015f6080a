"""Chooses the files of a split in a folder, by the naming conventions of data sets on the Hugging Face hub."""

import json
import re
from pathlib import Path

_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")
# files that describe a data set: `datasets.data_files.FILES_TO_IGNORE`, and those that `save_to_disk` writes
DESCRIPTIONS = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def split_of(path: Path) -> str | None:
    """Returns the split that a path names, by the rules of `datasets`; None if it names none.

    `data/train-00000-of-00002.parquet` → `"train"`, `dev/rows.jsonl` → `"validation"`, `contest.jsonl` → None

    Args:
        path: relative to the data set's folder; a folder's name goes before the file's.
    """
    from datasets.data_files import NON_WORDS_CHARS, SPLIT_KEYWORDS

    for part in (*path.parts[:-1], path.name.partition(".")[0]):
        found = []
        for split, words in SPLIT_KEYWORDS.items():
            for word in words:
                match = re.search(rf"(?:^|[{NON_WORDS_CHARS}]){word}(?:[{NON_WORDS_CHARS}]|$)", part.lower())
                found += [(match.start(), str(split))] if match else []
        if found:
            return min(found)[1]
    return None


def choose_split(folder: str, files: list[str], flag: str) -> tuple[list[str], list[str], str | None]:
    """Returns the files of a folder that belong to the split of a flag, if their names tell splits apart.

    Args:
        folder: as given to the flag.
        files: data files in it.
        flag: `--train_data_path` takes the training split, `--eval_data_path` the validation split, else the test
            split; any other flag takes all.

    Returns:
        the files; for each that is left out its name and split; why none can be taken.
    """
    wanted = {"--train_data_path": ("train",), "--eval_data_path": ("validation", "test")}.get(flag)
    splits = {file: split_of(Path(file).relative_to(folder)) for file in files} if wanted else {}
    if not any(splits.values()):
        return files, [], None
    # where no file is named after the wanted split, those without a split's name are
    named = next((split for split in wanted if split in splits.values()), None)
    chosen = [file for file in files if splits[file] == named]
    if not chosen or (named is None and flag == "--eval_data_path"):
        there = ", ".join(sorted({split for split in splits.values() if split}))
        return [], [], f"holds no file of the {wanted[0]} split, only of: {there}; name the files that are meant"
    kinds = sorted({match[1] for file in chosen if (match := _SHARD.match(Path(file).name))})
    if named and len(kinds) > 1:
        return [], [], f"holds several sets of that split ({', '.join(kinds)}); name one: {_glob(chosen, kinds[0])!r}"
    left_out = [f"{Path(file).relative_to(folder)} ({splits[file] or 'of no split'})" for file in files]
    return chosen, [text for file, text in zip(files, left_out, strict=True) if file not in chosen], None


def _glob(files: list[str], kind: str) -> str:
    file = next(Path(file) for file in files if Path(file).name.startswith(f"{kind}-"))
    return str(file.parent / f"{kind}-*{file.name.removeprefix(_SHARD.match(file.name)[0])}")


def is_cache_of_datasets(file: Path) -> bool:
    """Whether a file in a folder of `Dataset.save_to_disk` holds none of its rows: `map` leaves its caches there."""
    if file.suffix != ".arrow":
        return False
    try:
        state = json.loads((file.parent / "state.json").read_text(encoding="utf-8"))
        return file.name not in [part["filename"] for part in state["_data_files"]]
    except (OSError, ValueError, LookupError, TypeError):  # not such a folder
        return False
