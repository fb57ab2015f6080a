"""What a run inherits from the adapter or the run it starts from: base model, LoRA settings, chat format."""

import json
from pathlib import Path

from loguru import logger

from utils.model.adapter import ADAPTERS, adapter_of, names_where, row_of_type
from utils.model.rope import scaling_of_adapters
from utils.model.source import find_base, given_model, has_chat_template, is_source
from utils.runtime.errors import Problem, refusal
from utils.storage.files import project_path
from utils.storage.run_folder import MANIFEST, RECORD_FILE, read_run_note
from utils.storage.weights import weights_fingerprint

# the default in utils/args.py, which `auto` replaces for a base with a template of its own; an edited one is kept
_DEFAULT_TEMPLATE = "qwen"


def resolve(settings) -> None:
    """Takes base and settings from `--adapter_name_or_path`, and the template from the run it starts from."""
    common, given = settings.common, settings.given
    if common.adapter_name_or_path:
        common.adapter_name_or_path = project_path(str(Path(common.adapter_name_or_path).expanduser()))
        config, problems = settings.adapter = _read_adapter(common)
        if not problems:
            base = find_base(str(config["base_model_name_or_path"]), common.adapter_name_or_path)
            if "model_name_or_path" not in given and not _is_missing(base):
                common.model_name_or_path = base
            for name, key in adapter_of(common).settings.items():
                if name not in given:
                    setattr(common, name, config[key])
            if "lora_experts" not in given and adapter_of(common).takes("lora_experts"):
                common.lora_experts = bool(config.get("target_parameters"))
        _resolve_rope_scaling(common, given)
        if "add_tokens" not in given:  # which the base lacks
            common.add_tokens = read_run_note(common.adapter_name_or_path, "common").get("add_tokens")
    _resolve_template(settings)


def _resolve_rope_scaling(common, given: frozenset[str]) -> None:
    """Takes the scaling that the adapter was trained with, which its base's config.json lacks."""
    trained = scaling_of_adapters([common.adapter_name_or_path])
    if trained and "rope_scaling" not in given:
        common.rope_scaling = trained
    elif common.rope_scaling != trained:
        logger.warning(
            "--rope_scaling {} differs from {}, which the adapter was trained with", common.rope_scaling, trained
        )


def validate(settings) -> list[Problem]:
    """Checks the adapter's settings against each other, and the flags against the adapter that the run starts from."""
    common = settings.common
    config, problems = settings.adapter
    if common.adapter_name_or_path and not problems:
        flag = f"--adapter_name_or_path {common.adapter_name_or_path!r}"
        problems = _check_base(common, settings.given, flag, str(config["base_model_name_or_path"]))
        problems = problems or _check_weights(common, flag, common.adapter_name_or_path)
        problems += _contradictions(common, settings.given, flag, config)
    return problems + adapter_of(common).check(common)


def _contradictions(common, given: frozenset[str], flag: str, config: dict) -> list[Problem]:
    """Flags that contradict the adapter, or that apply only to a new one."""
    names = (
        "init_lora_weights", "lora_target_modules", "lora_experts", "train_router", "train_special_tokens",
        "add_tokens",
    )  # fmt: skip
    problems = [
        Problem(
            f"--{name} is for a new adapter, and {flag} brings its own; leave the flag out",
            flags=(name, "adapter_name_or_path"),
        )
        for name in names
        if name in given and adapter_of(common).is_adapter
    ]
    for name, key in row_of_type(config["peft_type"]).settings.items():
        if name in given and getattr(common, name) != config[key]:
            problems += refusal(
                f"--{name} {getattr(common, name)} contradicts {flag}, which has {config[key]}",
                name,
                "adapter_name_or_path",
            )
    return problems


def _read_adapter(common) -> tuple[dict, list[Problem]]:
    """The adapter_config.json of a folder or a hub's repository, and why it cannot be trained on."""
    path, own = common.adapter_name_or_path, adapter_of(common)
    flag = f"--adapter_name_or_path {path!r}"
    config, problem = _read_config(flag, path)
    if problem:
        return {}, [problem]
    rows = [own] if own.is_adapter else [row for row in ADAPTERS.values() if row.is_adapter]  # which are merged
    types = list(dict.fromkeys(row.peft_type for row in rows))
    if config.get("peft_type") not in types:
        return {}, refusal(
            f"{flag} is a {config.get('peft_type')} adapter; only {', '.join(types)} ones can be trained on with "
            f"--train_mode {common.train_mode}",
            "adapter_name_or_path",
            "train_mode",
        )
    lacking = sorted({*row_of_type(config["peft_type"]).settings.values(), "base_model_name_or_path"} - set(config))
    if lacking:
        return {}, refusal(
            f"{flag} has an adapter_config.json without {', '.join(lacking)}; give one that PEFT saved",
            "adapter_name_or_path",
        )
    return config, []


def _read_config(flag: str, path: str) -> tuple[dict, Problem | None]:
    file = Path(path) / "adapter_config.json"
    if not Path(path).exists() and path.count("/") == 1 and not path.startswith((".", "output/")):
        from peft import PeftConfig

        try:
            return PeftConfig.from_pretrained(path).to_dict(), None
        except Exception as error:  # the hub raises its own
            return {}, Problem(
                f"{flag} is neither a folder nor an adapter that can be had from a hub ({type(error).__name__})",
                flags=("adapter_name_or_path",),
            )
    if not file.is_file():
        held = "holds whole weights; give it as --model_name_or_path" if (Path(path) / "config.json").is_file() else (
            f"has no adapter_config.json; give the folder of a run with --train_mode {names_where()}"
        )  # fmt: skip
        return {}, Problem(
            f"{flag} {held if Path(path).is_dir() else 'is not a folder'}", flags=("adapter_name_or_path",)
        )
    if not (Path(path) / "adapter_model.safetensors").is_file():
        return {}, Problem(
            f"{flag} has no adapter_model.safetensors; give the folder of a finished run, or a checkpoint of it",
            flags=("adapter_name_or_path",),
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return config, None if isinstance(config, dict) else Problem(
            f"{flag} has an adapter_config.json without settings", flags=("adapter_name_or_path",)
        )
    except ValueError as error:
        return {}, Problem(
            f"{flag} has an adapter_config.json that is not JSON ({error})", flags=("adapter_name_or_path",)
        )


def _is_missing(base: str) -> bool:
    """Whether a recorded base is neither a folder nor like a hub's name."""
    return not Path(base).is_dir() and not is_source(base) and (Path(base).is_absolute() or base.count("/") != 1)


def _check_base(common, given: frozenset[str], flag: str, recorded: str) -> list[Problem]:
    base = find_base(recorded, common.adapter_name_or_path)
    if "model_name_or_path" not in given:
        if _is_missing(base):
            return refusal(
                f"{flag} was trained on {recorded!r}, which does not exist; give its new path as --model_name_or_path",
                "adapter_name_or_path",
                "model_name_or_path",
            )
    elif Path(base).is_dir() and Path(base).resolve() != Path(common.model_name_or_path).resolve():
        return refusal(
            f"{flag} was trained on {recorded!r}, not on --model_name_or_path {common.model_name_or_path!r}; leave "
            "--model_name_or_path out, or give that base",
            "adapter_name_or_path",
            "model_name_or_path",
        )
    return []


def _check_weights(common, flag: str, folder: str) -> list[Problem]:
    """Checks the base by its fingerprint: on other weights of the same shape an adapter would load without an error."""
    noted = read_run_note(folder, "base")
    then = noted.get("fingerprint")
    now = weights_fingerprint(common.model_name_or_path) if then else None
    if now in (None, then):
        return []
    base = common.model_name_or_path
    return refusal(
        f"{flag} was trained on {noted.get('path')!r} with weights {then}, and {base!r} has {now}; give the base it "
        "was trained on as --model_name_or_path",
        "adapter_name_or_path",
        "model_name_or_path",
    )


def _settings_of_run(folder: Path) -> dict:
    """The settings of a finished run, or of a checkpoint."""
    if (folder / MANIFEST).is_file():
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["settings"]["must"]
    return json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))["common"]


def _resolve_template(settings) -> None:
    """Takes the chat template of the run that this one starts from, unless another is given."""
    common, given = settings.common, settings.given
    if settings.task is None:
        return
    for folder in filter(None, (common.adapter_name_or_path, common.model_name_or_path)):
        try:
            trained = _settings_of_run(Path(folder))
            name = trained["template_name"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        tasks = settings.task, settings.tasks.get(trained.get("task_type"), settings.task)
        if not all(task.uses_template for task in tasks):
            return
        if "template_name" in given and common.template_name != name:
            logger.warning(
                "--template_name {} differs from {}, which {} was trained in", common.template_name, name, folder
            )
        elif common.template_name != name:
            common.template_name = name
            logger.info("template {}: the one that {} was trained in", name, folder)
        if "thinking" not in given and common.template_name == name:
            common.thinking = trained.get("thinking", common.thinking)
        return
    is_chosen = "template_name" in given or common.template_name != _DEFAULT_TEMPLATE
    if not is_chosen and settings.task.uses_template and has_chat_template(common.model_name_or_path):
        common.template_name = "auto"
        logger.info("template auto: the chat template of {}", given_model(common.model_name_or_path))
