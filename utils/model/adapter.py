"""The adapters: one row of a table per `--train_mode`, which holds all that other code may ask of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from loguru import logger

from utils.model.adapter_targets import find_targets, log_untouched
from utils.model.expert_targets import log_experts, peft_options
from utils.model.new_tokens import new_tokens
from utils.model.parts import freeze_towers
from utils.model.special_tokens import refuse_token_rows, special_tokens_to_train, token_rows
from utils.model.trainable import check_trainable, freeze_others
from utils.runtime.errors import Problem, refusal
from utils.runtime.text import format_setting

# flag → its value where it is left out; of the flags that only some adapters take, these are refused by the others
_NEUTRAL = {
    "use_dora": False,
    "use_rslora": False,
    "init_lora_weights": "default",
    "loraplus_lr_ratio": None,
    "lora_target_modules": None,
    "lora_experts": False,
    "train_router": False,
}
# what PEFT has not for experts, whose change it adds to their weights → the value that is allowed
_WITH_EXPERTS = {"lora_dropout": 0.0, "use_dora": False, "init_lora_weights": "default"}
ADAPTER_FLAGS = ("lora_rank", "lora_alpha", "lora_dropout", *_NEUTRAL, "train_special_tokens")


@dataclass(frozen=True)
class Adapter:
    """One way to train, `--train_mode`: a row of `ADAPTERS`.

    How an adapter is merged is not in the table: PEFT's own layers merge themselves, whoever trained them, and
    `utils.model.adapter_files.check_mergeable` names the kinds that cannot be merged.

    Attributes:
        label: its name on a run's card.
        build: `(args, **options)` → peft.PeftConfig. The options are those of every such configuration: `task_type`,
            `target_modules`, `exclude_modules`, and for rows that take these, `fan_in_fan_out` and
            `trainable_token_indices`. None where every weight is trained.
        peft_type: what `adapter_config.json` calls it, `"LORA"`.
        settings: flag → its name in `adapter_config.json`. A run takes them from the adapter it starts from.
        options: the other adapter flags that it takes; every other one is refused.
        extras: which of `fan_in_fan_out` and `trainable_token_indices` its configuration has.
        quantised: whether the base is loaded in 4 bits.
        on_4_bit_base: the row that replaces it where the base is saved in 4 bits; None where there is none.
        with_dora: what plans of memory call it with `--use_dora true`; None where it has no DoRA.
        rate_factor: its usual learning rates as a multiple of LoRA's.
    """

    label: str
    build: Callable | None = None
    peft_type: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    options: frozenset[str] = frozenset()
    extras: frozenset[str] = frozenset()
    quantised: bool = False
    on_4_bit_base: str | None = None
    with_dora: str | None = None
    rate_factor: float = 1.0

    @property
    def is_adapter(self) -> bool:
        """Whether the base stays as it is; otherwise every weight is trained."""
        return self.build is not None

    @property
    def trains_token_rows(self) -> bool:
        """Whether it can train the embeddings of single tokens as well."""
        return "train_special_tokens" in self.options

    def takes(self, flag: str) -> bool:
        """Whether one of `ADAPTER_FLAGS` changes anything."""
        return flag in self.settings or flag in self.options

    def without_foreign_flags(self, args):
        """A copy of CommonArgs in which the adapter flags that this row does not take have their neutral values."""
        return replace(args, **{name: value for name, value in _NEUTRAL.items() if not self.takes(name)})

    def check(self, args) -> list[Problem]:
        """Checks the adapter's flags against `--train_mode` and against each other; returns the problems."""
        given = [name for name, neutral in _NEUTRAL.items() if getattr(args, name) != neutral and not self.takes(name)]
        problems = [problem for name in given for problem in self._refuse(args, name)]
        if self.is_adapter and not self.trains_token_rows and args.train_special_tokens == "on":
            problems += self._refuse(args, "train_special_tokens")
        problems += check_trainable(args, self.is_adapter)
        if args.init_lora_weights == "pissa" and args.use_dora:
            problems += refusal(
                "--init_lora_weights pissa and --use_dora true both change how an adapter starts; give one",
                "init_lora_weights",
                "use_dora",
            )
        return problems + (self._check_experts(args) if args.lora_experts and self.takes("lora_experts") else [])

    def _check_experts(self, args) -> list[Problem]:
        """Checks the flags that PEFT has not for experts, whose change it adds to their weights."""
        return [
            problem
            for name, neutral in _WITH_EXPERTS.items()
            if self.takes(name) and getattr(args, name) != neutral
            for problem in refusal(
                f"--lora_experts true: PEFT has no --{name} {getattr(args, name)} for experts, whose change it adds to "
                f"their weights; use --{name} {format_setting(neutral)}, or leave --lora_experts out",
                "lora_experts",
                name,
            )
        ]

    def _refuse(self, args, flag: str) -> list[Problem]:
        mode, value = args.train_mode, getattr(args, flag)
        if not self.is_adapter:
            reason, others = f"needs an adapter, and --train_mode {mode} has none", names_where(_is_adapter)
        elif flag == "init_lora_weights" and self.quantised:
            reason = f"factorises the base's weights, which --train_mode {mode} has quantised"
            others = names_where(lambda row: row.takes(flag))
        else:
            reason, others = f"has no effect in --train_mode {mode}", names_where(lambda row: row.takes(flag))
        message = f"--{flag} {value} {reason}; use --train_mode {others}, or leave the flag out"
        return refusal(message, flag, "train_mode")

    def check_zero3(self, args) -> list[Problem]:
        """Checks the settings that read whole weight matrices, which ZeRO-3 splits; returns the problems."""
        if args.add_tokens:
            return refusal("--add_tokens adds rows to the embedding, which ZeRO-3 splits; use zero2", "add_tokens")
        if not self.is_adapter:
            return [] if not args.adapter_name_or_path else refusal(
                f"--train_mode {args.train_mode} merges --adapter_name_or_path into whole weights, which ZeRO-3 "
                "splits; use zero2",
                "train_mode",
                "adapter_name_or_path",
            )  # fmt: skip
        problems = []
        if args.lora_experts:
            problems += refusal(
                "--lora_experts true adds to the whole tensor of a layer's experts, which ZeRO-3 splits; use zero2",
                "lora_experts",
            )
        if args.init_lora_weights == "pissa":
            problems += refusal(
                "--init_lora_weights pissa factorises whole weight matrices, which ZeRO-3 splits; use zero2",
                "init_lora_weights",
            )
        if args.train_special_tokens == "on":
            problems += refusal(
                "--train_special_tokens on trains single rows of the embedding, which ZeRO-3 splits; use zero2, or off",
                "train_special_tokens",
            )
        return problems


def _lora(args, **options):
    """LoRA (arXiv 2106.09685), with DoRA, rsLoRA and PiSSA as its options."""
    from peft import LoraConfig

    return LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        use_dora=args.use_dora,
        use_rslora=args.use_rslora,
        init_lora_weights=True if args.init_lora_weights == "default" else args.init_lora_weights,
        **options,
    )


LORA = Adapter(
    label="LoRA",
    build=_lora,
    peft_type="LORA",
    settings={
        "lora_rank": "r",
        "lora_alpha": "lora_alpha",
        "lora_dropout": "lora_dropout",
        "use_dora": "use_dora",
        "use_rslora": "use_rslora",
    },
    options=frozenset(
        {
            "init_lora_weights",
            "loraplus_lr_ratio",
            "lora_target_modules",
            "lora_experts",
            "train_router",
            "train_special_tokens",
        }
    ),
    extras=frozenset({"fan_in_fan_out", "trainable_token_indices", "target_parameters", "modules_to_save"}),
    on_4_bit_base="qlora",
    with_dora="dora",
)
FULL = "full"  # the row that trains every weight
ADAPTERS = {
    FULL: Adapter(label="every weight"),
    "lora": LORA,
    "qlora": replace(
        LORA,
        label="QLoRA",
        quantised=True,
        on_4_bit_base="qlora",
        options=LORA.options - {"init_lora_weights"},
        with_dora="qlora with dora",
    ),
}


def adapter_of(args) -> Adapter:
    """The row of a run's `--train_mode`."""
    return ADAPTERS[args.train_mode]


def _is_adapter(row: Adapter) -> bool:
    return row.is_adapter


def names_where(condition: Callable[[Adapter], bool] = _is_adapter) -> str:
    """The `--train_mode` of the rows that meet a condition, for messages: `"lora or qlora"`."""
    return " or ".join(", ".join(name for name, row in ADAPTERS.items() if condition(row)).rsplit(", ", 1))


def row_of_type(peft_type: str | None) -> Adapter | None:
    """The first row whose adapters are of a type of `adapter_config.json`; None where no row trains them."""
    return next((row for row in ADAPTERS.values() if row.is_adapter and row.peft_type == peft_type), None)


def build_adapter(args, model, tokenizer, template, log: bool = True):
    """Makes the PEFT configuration that the trainer wraps the model with, and logs the parts that are not trained.

    Args:
        args: CommonArgs.
        model: the base, loaded.
        tokenizer: names the special tokens' ids.
        template: utils.template.Template, which uses them; None where plain text is trained.
        log: False where models of one run are built several times, so that each line comes once.

    Returns:
        peft.PeftConfig, or None where every weight is trained or the model has its adapter already.

    Raises:
        UserError: `--lora_target_modules` names a module that the model does not have, or that cannot be adapted.
    """
    row = adapter_of(args)
    if not row.is_adapter:
        freeze_towers(model, log)
        freeze_others(model, args, log)
        return None
    if args.adapter_name_or_path:
        from peft import PeftModel

        if isinstance(model, PeftModel):
            freeze_towers(model.get_base_model(), log)
        return None
    tokens: list[int] = []
    if template and row.trains_token_rows:
        tokens = special_tokens_to_train(args.train_special_tokens, model, tokenizer, template)
    if args.add_tokens:
        added = tokenizer.convert_tokens_to_ids(list(new_tokens(args)))
        tokens = [token for token in tokens if token not in added] + added
    if tokens:
        names = ", ".join(tokenizer.convert_ids_to_tokens(tokens))
        refuse_token_rows(model, names)
    targets = find_targets(model, args.lora_target_modules)
    if log:
        log_untouched(targets, model, args.lora_target_modules, args.lora_experts)
    config = new_config(args, model, targets, tokens)
    if log:
        log_experts(args, model)
    if tokens and log:
        logger.info("the embeddings of {} are trained as well", names)
    return config


def new_config(args, model, targets=None, tokens: list[int] | None = None):
    """The PEFT configuration of a new adapter.

    Args:
        args: CommonArgs, of an adapter's `--train_mode`.
        model: the base; its weights may be on the meta device.
        targets: from `find_targets`; found here by default.
        tokens: the ids whose embeddings are trained as well.

    Returns:
        peft.PeftConfig
    """
    row = adapter_of(args)
    targets = targets or find_targets(model, args.lora_target_modules)
    extras = peft_options(args, model) | {
        "fan_in_fan_out": targets.fan_in_fan_out,
        "trainable_token_indices": token_rows(model, tokens) if tokens else None,
    }
    return row.build(
        args,
        task_type=args.task.peft_task_type,
        target_modules=targets.target_modules,
        exclude_modules=targets.exclude_modules,
        **{name: value for name, value in extras.items() if name in row.extras},
    )


def saved_config(path: str):
    """The configuration of a trained adapter, to build one of the same shape; its start is the plain one.

    Args:
        path: the adapter's folder, or a hub's name.

    Returns:
        peft.PeftConfig
    """
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(path)
    config.inference_mode = False
    if getattr(config, "init_lora_weights", None) == "pissa":
        config.init_lora_weights = True  # its singular vectors are not needed for shapes
    return config
