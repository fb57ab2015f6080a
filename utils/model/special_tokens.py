"""Which special tokens' embeddings an adapter trains as well, and their rows as PEFT wants them."""

from utils.runtime.errors import UserError


def refuse_token_rows(model, names: str) -> None:
    """Refuses models whose embeddings cannot be trained for some tokens alone.

    PEFT 0.21's layer for trained rows computes a head as W h, and would lose its bias (GPT-J, Phi-2): DPO, `infer` and
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


def special_tokens_to_train(choice: str, model, tokenizer, template) -> list[int]:
    """The ids of the template's special tokens whose embeddings LoRA shall train.

    A base model has often never seen the chat tokens. Their embeddings are then what chance or
    weight decay left, LoRA leaves them frozen, and the model can neither read where a turn
    ends nor say it.

    Args:
        template: utils.template.Template
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


def token_rows(model, tokens: list[int]) -> dict[str, list[int]]:
    """PEFT's `trainable_token_indices`: the rows of the embedding, and of the head unless they are one matrix."""
    layers = {"input": model.get_input_embeddings(), "output": model.get_output_embeddings()}
    names = {
        key: next(name for name, module in model.named_modules() if module is layer) for key, layer in layers.items()
    }
    rows = {names["input"].split(".")[-1]: tokens}
    if layers["output"].weight is not layers["input"].weight:
        rows[names["output"].split(".")[-1]] = tokens
    return rows
