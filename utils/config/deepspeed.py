"""`--deepspeed`: short names, the launcher's default, and configurations that conflict with the flags."""

import json
from pathlib import Path

from loguru import logger

from utils.model.adapter import adapter_of
from utils.runtime.distributed import init_deepspeed, set_single_process_env, started_by_deepspeed, zero_stage
from utils.runtime.errors import Problem, nearest, refusal
from utils.runtime.log import is_main_process
from utils.storage.files import ROOT, project_path
from utils.storage.pickles import use_safe_deepspeed_load

CONFIGS = ROOT / "train_args" / "deepspeed_config"
NAMES = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
ALLOWED = ", ".join((*NAMES, "none"))
DEFAULT = "zero2"  # with DeepSpeed's launcher
_FROM_ACCELERATE = "the DeepSpeed configuration of accelerate"
GATHER = "stage3_gather_16bit_weights_on_model_save"


def resolve(settings) -> None:
    """Turns a short name into its file, and DeepSpeed's launcher without `--deepspeed` into ZeRO-2.

    A file that cannot be used is left out, so that the trainer's arguments can be built; `validate` reports it.
    """
    given = settings.values["deepspeed"] = _file_of(settings.values.get("deepspeed"))
    if given is None:
        return
    if _file_problems(given, settings.values):
        settings.values["deepspeed"] = None
    else:
        set_single_process_env()


def validate(settings) -> list[Problem]:
    """Checks DeepSpeed's file against the flags it must not replace."""
    given = _file_of(settings.requested.get("deepspeed"))
    return [] if given is None else _file_problems(given, settings.values)


def _file_of(given):
    """The file of a short name or the launcher's default; None without DeepSpeed."""
    if given is None:
        given = DEFAULT if started_by_deepspeed() else "none"
    if str(given).lower() in ("none", ""):
        return None
    return str(CONFIGS / f"ds_config_{given}.json") if given in NAMES else given


def _file_problems(given, values: dict) -> list[Problem]:
    config, problem = _read(given)
    return [problem] if problem else _wrong_sections(config, given) + _shadows(config, values, given)


def short_name(given):
    """The short name of one of this project's own files; anything else unchanged."""
    own = isinstance(given, str) and Path(given).parent == CONFIGS
    return Path(given).stem.removeprefix("ds_config_") if own else given


def _read(given) -> tuple[dict, Problem | None]:
    if isinstance(given, dict):
        return given, None
    text = str(given)
    if not text.lstrip().startswith("{"):
        file = Path(project_path(text)).expanduser()
        if not file.is_file():
            return {}, Problem(
                f"--deepspeed {text!r} is not a file.{nearest(text, NAMES)} Allowed: a file, {ALLOWED}",
                flags=("deepspeed",),
            )
        text = file.read_bytes()
    try:
        config = json.loads(text)
    except ValueError as error:  # not JSON, or not UTF-8
        return {}, Problem(f"--deepspeed {given!r} is not JSON ({error})", flags=("deepspeed",))
    return config, None if isinstance(config, dict) else Problem(
        f"--deepspeed {given!r} is not a JSON object", flags=("deepspeed",)
    )


def _wrong_sections(config: dict, given) -> list[Problem]:
    zero = config.get("zero_optimization")
    if zero is None:
        return refusal(
            f'--deepspeed {given!r} has no zero_optimization; add it, {{"stage": 0}} to split nothing',
            "deepspeed",
        )
    if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
        return refusal(
            f"--deepspeed {given!r} has zero_optimization {zero!r}; give an object with a stage of 0, 1, 2 or 3",
            "deepspeed",
        )
    return []


def _shadows(config: dict, values: dict, given) -> list[Problem]:
    """Sections of the configuration that would silently replace settings of the recipe."""
    problems = []
    checkpoint = config.get("checkpoint")
    if isinstance(checkpoint, dict) and checkpoint.get("load_universal"):
        problems += refusal(
            f"--deepspeed {given!r} has checkpoint.load_universal, whose files run code when they are read; remove it",
            "deepspeed",
        )
    for section, flag in (("optimizer", "optim"), ("scheduler", "lr_scheduler_type")):
        if section in config:
            kind = config[section].get("type") if isinstance(config[section], dict) else config[section]
            chosen = getattr(values.get(flag), "value", values.get(flag))
            problems += refusal(
                f"--deepspeed {given!r} has a section {section!r} ({kind}), which would replace --{flag} {chosen}; "
                "remove the section",
                "deepspeed",
                flag,
                code="DEEPSPEED_SHADOWS",
            )
    return problems


def resolve_plugin(settings) -> None:
    """Fills in DeepSpeed's configuration, whether it came by `--deepspeed` or by `accelerate launch`."""
    train_args = settings.train_args
    if train_args.deepspeed_plugin is None:
        return
    init_deepspeed()
    use_safe_deepspeed_load()
    _fill_in_accelerate_config(train_args)
    _gather_when_saving(train_args)


def _fill_in_accelerate_config(train_args) -> None:
    """Fills in the DeepSpeed configuration of `accelerate launch` and keeps it like that of `--deepspeed`.

    transformers would fill it in only when the trainer is built, after the weights are loaded.
    """
    plugin = train_args.deepspeed_plugin
    if getattr(train_args, "hf_deepspeed_config", None) is not None:
        return
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    config = HfTrainerDeepSpeedConfig(plugin.hf_ds_config.config)
    config.trainer_config_process(train_args)
    train_args.hf_deepspeed_config = plugin.hf_ds_config = plugin.dschf = config
    plugin.deepspeed_config = config.config


def _gather_when_saving(train_args) -> None:
    """Makes ZeRO-3 gather the split weights when they are saved; otherwise a run would end without weights."""
    if zero_stage(train_args) != 3:
        return
    zero = train_args.hf_deepspeed_config.config["zero_optimization"]
    if zero.get(GATHER) is not True:
        zero[GATHER] = True
        if is_main_process():
            logger.info("{} is set to true for this run: without it ZeRO-3 saves no weights to load", GATHER)


def _read_mismatch(text: str) -> tuple[str, str, str, str]:
    """Parses transformers' text on a mismatch: (key of the configuration, its value, flag, that flag's value).

    transformers (5.x, HfTrainerDeepSpeedConfig.fill_match) keeps only a text: `"- ds fp16.enabled=True vs hf
    fp16|fp16_full_eval+fp16_backend(amp)=False"`. The flag is empty where several decide the value.
    """
    theirs, _, ours = text.removeprefix("- ds ").partition(" vs hf ")
    key, _, value = theirs.partition("=")
    flag, _, flag_value = ours.rpartition("=")
    return key, value, flag if flag.isidentifier() else "", flag_value


def validate_plugin(settings) -> list[Problem]:
    """Checks the DeepSpeed configuration in use against the flags, and what cannot work together."""
    common, train_args = settings.common, settings.train_args
    if train_args.deepspeed_plugin is None:
        return []
    problems = _mismatches(train_args)
    if common.on_nan == "skip":
        problems += refusal(
            "--on_nan skip: DeepSpeed steps by itself, so no step can be left out; use --on_nan stop", "on_nan"
        )
    return problems + (adapter_of(common).check_zero3(common) if zero_stage(train_args) == 3 else [])


def _mismatches(train_args) -> list[Problem]:
    """Keys of the configuration that contradict a flag, or leave out what a flag sets."""
    config = getattr(train_args, "hf_deepspeed_config", None)
    if config is None:
        return []
    # a key of accelerate's configuration came by no flag
    source, flags = ("--deepspeed", ("deepspeed",)) if train_args.deepspeed else (_FROM_ACCELERATE, ())
    code = "DEEPSPEED_SHADOWS" if train_args.deepspeed else "ARGUMENTS"
    problems = []
    for mismatch in config.mismatches:
        key, value, flag, flag_value = _read_mismatch(mismatch)
        ours = f"--{flag} is {flag_value}" if flag else f"the flags make it {flag_value}"
        problems += refusal(
            f'{source} has {key} {value}, and {ours}; write "auto" for {key} in the file, or give the same',
            *flags,
            *filter(None, [flag]),
            code=code,
        )
    if train_args.max_grad_norm and config.get_value("gradient_clipping") is None:
        problems += refusal(
            f"{source} has no gradient_clipping, so --max_grad_norm {train_args.max_grad_norm} would do nothing; "
            'write "gradient_clipping": "auto" into the file',
            *flags,
            "max_grad_norm",
            code=code,
        )
    return problems
