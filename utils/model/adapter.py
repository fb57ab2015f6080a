"""Adapters: one table row each, turned into a PEFT configuration."""

from dataclasses import dataclass

from loguru import logger

from utils.model.adapter_targets import find_targets, tell
from utils.model.parts import freeze_towers
from utils.runtime.errors import UserError
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
        _refuse_token_rows(model, ", ".join(tokenizer.convert_ids_to_tokens(tokens)))
    targets = find_targets(model, args.lora_target_modules)
    tell(targets, model, args.lora_target_modules)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=targets.target_modules,
        exclude_modules=targets.exclude_modules,
        fan_in_fan_out=targets.fan_in_fan_out,
        use_dora=args.use_dora,
        use_rslora=args.use_rslora,
        init_lora_weights=True if args.init_lora_weights == "default" else args.init_lora_weights,
        trainable_token_indices=_token_rows(model, tokens) if tokens else None,
    )
    if tokens:
        names = tokenizer.convert_ids_to_tokens(tokens)
        logger.info("the embeddings of {} are trained as well", ", ".join(names))
    return config


def _refuse_token_rows(model, names: str) -> None:
    """Refuses models whose embeddings cannot be trained for some tokens alone.

    PEFT's layer for trained rows computes a head as W h, and would lose its bias (GPT-J, Phi-2): DPO, `infer` and
    every other program would see other logits than the loss of SFT.
    """
    if hasattr(model.get_input_embeddings().weight, "ds_numel"):
        raise UserError(
            f"the embeddings of {names} are to be trained, and ZeRO-3 splits them; use --deepspeed zero2, or "
            "--train_special_tokens off to leave them as they are"
        )
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise UserError(
            f"the embeddings of {names} are to be trained, and PEFT leaves out the bias that the head of "
            f"{type(model).__name__} has where it trains rows; use --train_special_tokens off to leave them as they "
            "are, or --train_mode full"
        )


def special_tokens_to_train(choice: str, model, tokenizer, template: Template) -> list[int]:
    """The ids of the template's special tokens whose embeddings LoRA shall train.

    A base model has often never seen the chat tokens. Their embeddings are then what chance or
    weight decay left, LoRA leaves them frozen, and the model can neither read where a turn
    ends nor say it.

    Args:
        choice: `on` for all of them, `off` for none, `auto` for those never trained.
    """
    if choice == "off":
        return []
    ids = tokenizer.convert_tokens_to_ids(template.special_tokens(tokenizer))
    if choice == "on":
        return ids
    untrained = untrained_tokens(model, tokenizer)
    return [token for token in ids if token in untrained]


def untrained_tokens(model, tokenizer) -> set[int]:
    """The ids whose embedding, or whose row of the head, was never trained.

    Tokens that cannot occur in any text show what training leaves of a row it never meets: its
    start, decayed, or pushed with its like in the one direction that makes them all unlikely. A
    row as near to their mean as they themselves are, and not smaller, was never trained either.
    A row of next to no norm never was, whatever the others are.
    """
    import torch
    from peft.utils.integrations import gather_params_ctx

    found: set[int] = set()
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        with gather_params_ctx(layer.weight):  # ZeRO-3 leaves each process a part
            rows = layer.weight.detach().float().clone()
        never = impossible_tokens(tokenizer, len(rows))
        norms = rows.norm(dim=-1)
        untrained = norms < 0.01 * norms.median()
        if never:
            centre = rows[never].mean(dim=0)
            distances = (rows - centre).norm(dim=-1)
            untrained |= (distances <= 1.1 * distances[never].max()) & (norms >= 0.8 * norms[never].min())
        found |= set(torch.nonzero(untrained).flatten().tolist())
    return found


def impossible_tokens(tokenizer, rows: int) -> list[int]:
    """Ids that no text has: bytes that UTF-8 does not use, and the rows beyond the vocabulary.

    Args:
        tokenizer: a byte-level one, or one with byte fallback, has the former.
        rows: of the embedding, often rounded up from the vocabulary.
    """
    vocabulary = tokenizer.get_vocab()
    unused_bytes = [0xC0, 0xC1, *range(0xF5, 0x100)]
    names = [f"<0x{byte:02X}>" for byte in unused_bytes]
    if names[0] not in vocabulary and '"ByteLevel"' in tokenizer.backend_tokenizer.to_str():
        names = [chr(byte) for byte in unused_bytes]  # byte-level BPE writes these bytes as Latin-1
    ids = [vocabulary[name] for name in names if name in vocabulary]
    return ids + list(range(max(vocabulary.values()) + 1, rows))


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
    _show_head_bias(model)
    _leave_casts_to_autocast()
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


def _show_head_bias(model) -> None:
    """Gives a head wrapped for trained token rows the `bias` that TRL's fused loss reads from it.

    PEFT's wrapper passes `weight` through, with the trained rows in it, and no other attribute.
    """
    from peft.utils.other import TrainableTokensWrapper

    head = model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):
        head.register_parameter("bias", getattr(head.original_module, "bias", None))


def _leave_casts_to_autocast() -> None:
    """Spares each adapter a float32 copy of its input, which autocast would only turn back: time, and a copy kept."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    def cast(layer, x, dtype):
        return x if x is None or torch.is_autocast_enabled(x.device.type) else x.to(dtype)

    BaseTunerLayer._cast_input_dtype = cast


def _token_rows(model, tokens: list[int]) -> dict[str, list[int]]:
    """PEFT's `trainable_token_indices`: the rows of the embedding, and of the head unless they are one matrix."""
    layers = {"input": model.get_input_embeddings(), "output": model.get_output_embeddings()}
    names = {
        key: next(name for name, module in model.named_modules() if module is layer) for key, layer in layers.items()
    }
    rows = {names["input"].split(".")[-1]: tokens}
    if layers["output"].weight is not layers["input"].weight:
        rows[names["output"].split(".")[-1]] = tokens
    return rows
