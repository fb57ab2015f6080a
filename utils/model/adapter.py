"""Adapters: one table row each, turned into a PEFT configuration."""

from dataclasses import dataclass

from loguru import logger

from utils.model.adapter_targets import find_targets, tell
from utils.model.parts import freeze_towers
from utils.model.special_tokens import refuse_token_rows, special_tokens_to_train, token_rows
from utils.patches.layers import leave_casts_to_autocast, show_head_bias
from utils.template import Template


@dataclass(frozen=True)
class Adapter:
    """A kind of training.

    Attributes:
        quantised: whether the base is in 4 bits.
        lora: whether low-rank adapters are added; otherwise every weight is trained.
    """

    quantised: bool
    lora: bool


ADAPTERS = {
    "full": Adapter(quantised=False, lora=False),
    "lora": Adapter(quantised=False, lora=True),
    "qlora": Adapter(quantised=True, lora=True),
}


def build_adapter(args, model, tokenizer, template: Template | None):
    """Makes the PEFT configuration that the trainer wraps the model with.

    Args:
        args: CommonArgs.
        model: the base, loaded.
        tokenizer: names the special tokens' ids.
        template: uses them; None where plain text is trained.

    Returns:
        peft.LoraConfig, or None where every weight is trained or the model has its adapter already.

    Raises:
        UserError: `--lora_target_modules` names a module that the model does not have, or that cannot be adapted.
    """
    if not ADAPTERS[args.train_mode].lora:
        freeze_towers(model)
        return None
    from peft import LoraConfig, PeftModel, TaskType

    if args.adapter_name_or_path:
        if isinstance(model, PeftModel):
            freeze_towers(model.get_base_model())
        return None

    tokens = special_tokens_to_train(args.train_special_tokens, model, tokenizer, template) if template else []
    if tokens:
        refuse_token_rows(model, ", ".join(tokenizer.convert_ids_to_tokens(tokens)))
    targets = find_targets(model, args.lora_target_modules)
    tell(targets, model, args.lora_target_modules)
    config = LoraConfig(
        task_type=TaskType[args.task.peft_task_type],
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=targets.target_modules,
        exclude_modules=targets.exclude_modules,
        fan_in_fan_out=targets.fan_in_fan_out,
        use_dora=args.use_dora,
        use_rslora=args.use_rslora,
        init_lora_weights=True if args.init_lora_weights == "default" else args.init_lora_weights,
        trainable_token_indices=token_rows(model, tokens) if tokens else None,
    )
    if tokens:
        names = tokenizer.convert_ids_to_tokens(tokens)
        logger.info("the embeddings of {} are trained as well", ", ".join(names))
    return config


def adapter_weights(model) -> dict | None:
    """The weights of an adapter that is on the model already, by name; None where there is none."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return None
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def settle_trainable(model, one_type: bool, start: dict | None) -> None:
    """Undoes what on the way into TRL's trainer would cost exactness.

    Args:
        model: the trainer's, wrapped by PEFT or whole.
        one_type: whether the weights must keep the type they have.
        start: the weights the adapter came with, from `adapter_weights`.
    """
    show_head_bias(model)
    leave_casts_to_autocast()
    if not one_type:
        # TRL rounds QLoRA's adapters to bf16, and PEFT gives trained token rows the base's type. An update
        # below 1/256 of a bf16 weight is lost, and fp16's gradient scaling refuses fp16 weights
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    _restore(model, start) if start else _restore_token_rows(model)


def _restore(model, start: dict) -> None:
    """Gives the adapter, and the copy of it that is DPO's reference, the weights they came with.

    TRL copies them before it rounds the policy's to bf16, and leaves out trained token rows,
    whose names end where it looks for more.
    """
    weights = dict(model.named_parameters())
    for name, value in start.items():
        weights[name].data = value.to(weights[name].dtype).clone()
        copy = ".".join("ref" if part == "default" else part for part in name.split("."))
        if copy in weights:
            weights[copy].data = weights[name].data.clone()


def _restore_token_rows(model) -> None:
    """A new adapter's trained token rows begin as the base's, not as those rounded to bf16."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    for module in model.modules():
        if isinstance(module, TrainableTokensLayer):
            for name, rows in module.trainable_tokens_delta.items():
                rows.data = module.trainable_tokens_original[name].to(rows.dtype).clone()
