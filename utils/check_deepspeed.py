"""`--deepspeed`: short names, the launcher's default, and configurations that fight with the flags."""

import json
from pathlib import Path

from loguru import logger

from utils.errors import nearest
from utils.launch import begin_alone, started_by_deepspeed
from utils.log import is_main_process
from utils.paths import ROOT, project_path

CONFIGS = ROOT / "train_args" / "deepspeed_config"
NAMES = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
ALLOWED = ", ".join((*NAMES, "none"))
DEFAULT = "zero2"  # of DeepSpeed's launcher
GATHER = "stage3_gather_16bit_weights_on_model_save"


def settle_deepspeed(values: dict) -> list[str]:
    """Turns a short name into its file, and DeepSpeed's launcher without a name into ZeRO-2.

    Args:
        values: the recipe's, of which `deepspeed` is settled.

    Returns:
        the problems with the file.
    """
    given = values.get("deepspeed")
    if given is None:
        given = DEFAULT if started_by_deepspeed() else "none"
    if str(given).lower() in ("none", ""):
        values["deepspeed"] = None
        return []
    if given in NAMES:
        given = str(CONFIGS / f"ds_config_{given}.json")
    values["deepspeed"] = given
    config, problem = _read(given)
    problems = [problem] if problem else _wrong_sections(config, given) + _shadows(config, values, given)
    if problems:
        values["deepspeed"] = None  # so that the other problems can be told as well
    else:
        begin_alone()
    return problems


def short_name(given):
    """The short name of one of this project's own files; anything else as it is."""
    own = isinstance(given, str) and Path(given).parent == CONFIGS
    return Path(given).stem.removeprefix("ds_config_") if own else given


def _read(given) -> tuple[dict, str | None]:
    if isinstance(given, dict):
        return given, None
    text = str(given)
    if not text.lstrip().startswith("{"):
        file = Path(project_path(text)).expanduser()
        if not file.is_file():
            return {}, f"--deepspeed {text!r} is no file.{nearest(text, NAMES)} Allowed: a file, {ALLOWED}"
        text = file.read_bytes()
    try:
        config = json.loads(text)
    except ValueError as error:  # not JSON, or not UTF-8
        return {}, f"--deepspeed {given!r} is not JSON ({error})"
    return config, None if isinstance(config, dict) else f"--deepspeed {given!r} is not a JSON object"


def _wrong_sections(config: dict, given) -> list[str]:
    zero = config.get("zero_optimization")
    if zero is None:
        return [f'--deepspeed {given!r} has no zero_optimization; give it, {{"stage": 0}} where nothing is to be split']
    if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
        return [f"--deepspeed {given!r} has zero_optimization {zero!r}; give an object with a stage of 0, 1, 2 or 3"]
    return []


def _shadows(config: dict, values: dict, given) -> list[str]:
    """Sections that would replace what the recipe says, without a word."""
    problems = []
    checkpoint = config.get("checkpoint")
    if isinstance(checkpoint, dict) and checkpoint.get("load_universal"):
        problems.append(
            f"--deepspeed {given!r} has checkpoint.load_universal, whose files run code when they are read; remove it"
        )
    for section, flag in (("optimizer", "optim"), ("scheduler", "lr_scheduler_type")):
        if section in config:
            kind = config[section].get("type") if isinstance(config[section], dict) else config[section]
            chosen = getattr(values.get(flag), "value", values.get(flag))
            problems.append(
                f"--deepspeed {given!r} has a section {section!r} ({kind}), which would replace --{flag} {chosen}; "
                "remove the section"
            )
    return problems


def settle_plugin(train_args) -> None:
    """Settles DeepSpeed's configuration, whether it came by `--deepspeed` or by `accelerate launch`."""
    _adopt_accelerates(train_args)
    _gather_at_saving(train_args)


def _adopt_accelerates(train_args) -> None:
    """Treats the DeepSpeed configuration of `accelerate launch` as that of `--deepspeed`, filled in and kept alike.

    transformers would fill it in only once the trainer is made, after the weights are loaded.
    """
    plugin = train_args.deepspeed_plugin
    if getattr(train_args, "hf_deepspeed_config", None) is not None:
        return
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    config = HfTrainerDeepSpeedConfig(plugin.hf_ds_config.config)
    config.trainer_config_process(train_args)
    train_args.hf_deepspeed_config = plugin.hf_ds_config = plugin.dschf = config
    plugin.deepspeed_config = config.config


def _gather_at_saving(train_args) -> None:
    """Has ZeRO-3 put the split weights together when they are saved; otherwise a run would end without weights."""
    if zero_stage(train_args) != 3:
        return
    zero = train_args.hf_deepspeed_config.config["zero_optimization"]
    if zero.get(GATHER) is not True:
        zero[GATHER] = True
        if is_main_process():
            logger.info("{} is set to true for this run: without it ZeRO-3 saves no weights to load", GATHER)


def zero_stage(train_args) -> int:
    """The ZeRO stage, 0 without DeepSpeed."""
    return train_args.deepspeed_plugin.zero_stage if train_args.deepspeed_plugin is not None else 0


def check_deepspeed(common, train_args) -> list[str]:
    """Checks the DeepSpeed configuration against the flags, and what cannot work together.

    Returns:
        the problems, each naming both values.
    """
    if train_args.deepspeed_plugin is None:
        return []
    config = getattr(train_args, "hf_deepspeed_config", None)
    source = "--deepspeed" if train_args.deepspeed else "the DeepSpeed configuration of accelerate"
    problems = []
    for mismatch in config.mismatches if config else []:
        theirs, _, ours = mismatch.removeprefix("- ds ").partition(" vs hf ")
        key, _, value = theirs.partition("=")
        flag, _, flag_value = ours.rpartition("=")
        ours = f"--{flag} is {flag_value}" if flag.isidentifier() else f"the flags make it {flag_value}"
        problems.append(
            f'{source} says {key} {value}, and {ours}; write "auto" for {key} in the file, or give the same'
        )
    if train_args.max_grad_norm and config is not None and config.get_value("gradient_clipping") is None:
        problems.append(
            f"{source} has no gradient_clipping, so --max_grad_norm {train_args.max_grad_norm} would do nothing; "
            'write "gradient_clipping": "auto" into the file'
        )
    name = f"ZeRO-{zero_stage(train_args)}"
    if common.on_nan == "skip":
        problems.append("--on_nan skip: DeepSpeed steps by itself, so no step can be left out; use --on_nan stop")
    if zero_stage(train_args) == 3:
        if common.init_lora_weights == "pissa":
            problems.append(f"--init_lora_weights pissa takes whole weights apart, which {name} splits; use zero2")
        if common.train_special_tokens == "on" and common.train_mode != "full":
            problems.append(
                f"--train_special_tokens on trains single rows of the embedding, which {name} splits; use zero2, or off"
            )
        if common.adapter_name_or_path and common.train_mode == "full":
            problems.append(
                f"--train_mode full merges --adapter_name_or_path into whole weights, which {name} splits; use zero2"
            )
    return problems
