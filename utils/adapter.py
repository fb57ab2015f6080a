"""Adapters: one table row each, turned into a PEFT configuration."""

from dataclasses import dataclass

from loguru import logger

from utils.errors import UserError
from utils.template import Template

# a router's output chooses experts; a low-rank change there sends tokens elsewhere and unsettles training
ROUTER_NAMES = ("gate", "router", "shared_expert_gate")


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


def build_adapter(args, model, tokenizer, template: Template):
    """Makes the PEFT configuration that the trainer wraps the model with.

    Args:
        args: CommonArgs.
        model: the base, loaded.
        tokenizer: names the special tokens' ids.
        template: uses them.

    Returns:
        peft.LoraConfig, or None where every weight is trained.

    Raises:
        UserError: `--lora_target_modules` names a module the model does not have.
    """
    if not ADAPTERS[args.train_mode].lora:
        return None
    from peft import LoraConfig, TaskType

    tokens = special_tokens_to_train(args.train_special_tokens, model, tokenizer, template)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=target_modules(model, args.lora_target_modules),
        use_dora=args.use_dora,
        use_rslora=args.use_rslora,
        init_lora_weights=True if args.init_lora_weights == "default" else args.init_lora_weights,
        trainable_token_indices=_token_rows(model, tokens) if tokens else None,
    )
    if tokens:
        names = tokenizer.convert_ids_to_tokens(tokens)
        logger.info("the embeddings of {} are trained as well", ", ".join(names))
    return config


def target_modules(model, chosen: str | None) -> list[str]:
    """The names of the modules that get an adapter.

    `["down_proj", "gate_proj", "k_proj", …]` for a Llama.

    Args:
        model: the base.
        chosen: names separated by commas, or None for every linear layer but head and routers.
    """
    import torch

    head = model.get_output_embeddings()
    linear = {
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head
    }
    names = {name.split(".")[-1] for name in linear}
    if chosen is None:
        return sorted(names - set(ROUTER_NAMES))
    wanted = [name.strip() for name in chosen.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in names and name not in linear]
    if unknown or not wanted:
        raise UserError(
            f"--lora_target_modules {chosen!r}: the model has no linear layer {', '.join(map(repr, unknown))}. "
            f"It has {', '.join(sorted(names))}"
        )
    return wanted


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
    return ids if choice == "on" else [token for token in ids if token in untrained_tokens(model)]


def untrained_tokens(model) -> set[int]:
    """The ids whose embedding, or whose row of the head, was never trained.

    Training moves embeddings to a common size, and a row it never touched keeps the small size
    of its start or has decayed towards zero. The measure is a robust one: half of the median
    norm, and more than six median deviations below the median.
    """
    import torch

    found: set[int] = set()
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if layer is None:
            continue
        norms = layer.weight.detach().float().norm(dim=-1)
        median = norms.median()
        spread = (norms - median).abs().median()
        small = (norms < 0.5 * median) & (norms < median - 6 * spread)
        found |= set(torch.nonzero(small).flatten().tolist())
    return found


def settle_trainable(model, sharded: bool) -> None:
    """Undoes two things on the way into TRL's trainer that would cost exactness.

    Args:
        model: the trainer's, wrapped by PEFT or whole.
        sharded: whether DeepSpeed or FSDP lays the weights out, which needs one type for all.
    """
    _show_head_bias(model)
    if not sharded:
        # TRL rounds QLoRA's adapters to bf16, and PEFT gives trained token rows the base's type. An update
        # below 1/256 of a bf16 weight is lost, and fp16's gradient scaling refuses fp16 weights
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def _show_head_bias(model) -> None:
    """Gives a head wrapped for trained token rows the `bias` that TRL's fused loss reads from it.

    PEFT's wrapper passes `weight` through, with the trained rows in it, and no other attribute.
    """
    from peft.utils.other import TrainableTokensWrapper

    head = model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):
        head.register_parameter("bias", getattr(head.original_module, "bias", None))


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
