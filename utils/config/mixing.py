"""Checks of mixtures and curricula: the sources of `--train_data_path`, and settings that contradict each other."""

from utils.data.columns import parse_columns
from utils.data.curriculum import COLUMN
from utils.data.mixture import CONCAT, FIRST, INTERLEAVE, ROWS, WEIGHTED, strategy_of
from utils.data.sources import Source, is_mixture, read_sources, source_files
from utils.runtime.errors import Problem, nearest, refusal


def validate(settings) -> list[Problem]:
    """Returns the problems with the sources, with the flags of mixing, and with `--curriculum`."""
    problems = _check_curriculum(settings)
    if not is_mixture(settings.common):
        for name, default in (("mixing_unit", ROWS), ("mixing_stop", FIRST)):
            if (value := getattr(settings.common, name)) != default:
                problems += refusal(
                    f"--{name} {value} has no effect without a mixture; give --train_data_path weights, as in "
                    "a.jsonl:0.7,b.jsonl:0.3, or leave it out",
                    name,
                )
        return problems
    sources, wrong = read_sources(settings.common.train_data_path)
    problems += wrong
    if settings.task is not None:
        problems += source_files(sources, settings.task.file_suffixes)[1]
        problems += _check_sources(settings, sources)
    return problems + _check_strategy(settings, sources) + _check_other_settings(settings)


def _check_strategy(settings, sources: list[Source]) -> list[Problem]:
    """Refuses weights without weighted, and the reverse, and settings that the strategy does not use."""
    common, problems = settings.common, []
    weighted = bool(sources) and sources[0].weight is not None
    strategy = strategy_of(common, sources)
    given = f"--mixing_strategy {strategy}" if common.mixing_strategy else f"{strategy}, the default here,"
    if strategy == WEIGHTED and not weighted:
        problems += refusal(
            f"{given} needs the weight of each source; give them as in a.jsonl:0.7,b.jsonl:0.3",
            "mixing_strategy", "train_data_path",
        )  # fmt: skip
    if strategy != WEIGHTED and weighted:
        problems += refusal(
            f"{given} does not use the weights of --train_data_path; remove them, or use --mixing_strategy weighted",
            "mixing_strategy", "train_data_path",
        )  # fmt: skip
    if strategy != WEIGHTED and common.mixing_unit != ROWS:
        text = f"--mixing_unit {common.mixing_unit} is for weights, and {given} has none; leave it out"
        problems += refusal(text, "mixing_unit")
    if strategy == CONCAT and common.mixing_stop != FIRST:
        text = f"--mixing_stop {common.mixing_stop} has no effect with {given} which takes all rows; leave it out"
        problems += refusal(text, "mixing_stop")
    repeated = [source.name for source in sources if source.repeat != 1]
    if strategy in (INTERLEAVE, WEIGHTED) and repeated:
        text = f"repeat of the source {repeated[0]!r} is for concat: with {given} --mixing_stop decides how often a"
        problems += refusal(f"{text} source is gone through; remove it", "train_data_path", "mixing_strategy")
    return problems


def _check_sources(settings, sources: list[Source]) -> list[Problem]:
    """Refuses settings of a source that the task or another setting does not use."""
    task, problems = settings.task, []
    for source in sources:
        about = f"--train_data_path: of the source {source.name!r}"
        for name in ("system", "template_args"):
            if getattr(source, name) and not task.uses_template:
                text = f"{about} {name} is given, and --task_type {task.name} has no chat template; remove it"
                problems += refusal(text, "train_data_path")
        if source.rows is not None and task.packs(settings.train_args):
            text = f"{about} rows counts rows of the files, and --packing true packs them; use repeat or a weight"
            problems += refusal(text, "train_data_path", "packing")
        known = task.row_type.known_fields
        for name in parse_columns(source.columns)[0]:
            if known and name not in known:
                text = f"{about} columns names {name!r}, a field that no format of a {task.row_type.name} has."
                problems += refusal(text + nearest(name, known), "train_data_path", "columns")
    return problems


def _check_other_settings(settings) -> list[Problem]:
    """Refuses settings that order rows in another way, or that need the rows of one set of files."""
    common, train_args, problems = settings.common, settings.train_args, []
    if (strategy := train_args.train_sampling_strategy) != "random":
        problems += _refuse("train_sampling_strategy", strategy, "a mixture of sources, which has its own order")
    if common.curriculum != "none":
        problems += _refuse("curriculum", common.curriculum, "a mixture of sources, which has its own order")
    if common.val_size >= 1:
        message = "a mixture, where a share of each source is held back; give a share below 1, or --eval_data_path"
        problems += _refuse("val_size", f"{common.val_size:g}", message)
    if getattr(train_args, "precompute_ref_log_probs", False):
        problems += _refuse("precompute_ref_log_probs", "true", "a mixture of sources; leave it out")
    return problems


def _check_curriculum(settings) -> list[Problem]:
    train_args, value = settings.train_args, settings.common.curriculum
    if value == "none":
        return []
    if value != "length" and not value.removeprefix(COLUMN) * value.startswith(COLUMN):
        text = f"--curriculum {value!r} is not allowed; give none, length, or column: and the name of a field"
        return refusal(text, "curriculum")
    problems = []
    if (strategy := train_args.train_sampling_strategy) != "random":
        problems += _refuse("train_sampling_strategy", strategy, f"--curriculum {value}, which has its own order")
    if getattr(train_args, "packing", False):
        problems += _refuse("packing", "true", f"--curriculum {value}: packed rows hold rows of the whole order")
    return problems


def _refuse(name: str, value, what: str) -> list[Problem]:
    return refusal(f"--{name} {value} cannot be combined with {what}", name)
