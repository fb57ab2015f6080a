"""Answers of a model: how its tokens are chosen, and many prompts at once."""

import math
from dataclasses import dataclass

from utils.errors import UserError
from utils.flags import arg


@dataclass
class GenerateArgs:
    """Flags of generation, named as in transformers' `generate`."""

    max_new_tokens: int = arg(512, "The longest answer in tokens.")
    do_sample: bool = arg(False, "Sample instead of taking the likeliest token each time.")
    temperature: float = arg(0.7, "With --do_sample: below 1 sharper, above 1 flatter.")
    top_p: float = arg(0.9, "With --do_sample: only the likeliest tokens with this share of the probability.")
    top_k: int = arg(0, "With --do_sample: only so many of the likeliest tokens; 0 for all.")
    repetition_penalty: float = arg(1.0, "Above 1: tokens that stand already become less likely.")
    num_beams: int = arg(1, "Beams of a beam search; 1 for none.")
    seed: int = arg(42, "With --do_sample: the same seed gives the same answers.")


def check_generate(args: GenerateArgs) -> list[str]:
    """The problems of the figures."""
    allowed = {
        "max_new_tokens": (args.max_new_tokens >= 1, "a whole number of at least 1"),
        "temperature": (0 < args.temperature < math.inf, "a number above 0, or --do_sample false"),
        "top_p": (0 < args.top_p <= 1, "a number above 0, at most 1"),
        "top_k": (args.top_k >= 0, "a whole number of at least 0"),
        "repetition_penalty": (0 < args.repetition_penalty < math.inf, "a number above 0"),
        "num_beams": (args.num_beams >= 1, "a whole number of at least 1"),
        "seed": (args.seed >= 0, "a whole number of at least 0"),
    }
    return [
        f"--{name} {getattr(args, name)} is not allowed; give {text}"
        for name, (fine, text) in allowed.items()
        if not fine
    ]


def options_of(args: GenerateArgs, max_new_tokens: int) -> dict:
    """The flags as `generate` takes them."""
    options = {"repetition_penalty": args.repetition_penalty, "num_beams": args.num_beams}
    options["max_new_tokens"] = max_new_tokens
    if args.do_sample:
        return options | {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    # a base may bring sampling figures, which greedy decoding would warn of
    return options | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def room_for(model, prompt: list[int], args: GenerateArgs) -> int:
    """How many tokens an answer may have: `--max_new_tokens`, or fewer where the model's context ends before."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or len(prompt) + 2**31
    return min(args.max_new_tokens, context - len(prompt))


def prompt_ids(model, tokenizer, messages: list[dict], tools: list | None = None) -> list[int]:
    """The token ids a conversation is answered from, in the format the tokenizer was saved with.

    Raises:
        UserError: the format refuses the conversation, or it fills the model's context.
    """
    from jinja2 import TemplateError

    try:
        ids = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=True)
    except TemplateError as error:
        raise UserError(f"the model's chat format refuses the conversation: {error}") from error
    ids = list(ids["input_ids"])
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context and len(ids) >= context:
        raise UserError(f"the prompt has {len(ids):,} tokens, and the model's context is {context:,}; shorten it")
    return ids


def generate_batch(model, tokenizer, prompts: list[list[int]], args: GenerateArgs) -> list[str]:
    """Answers several prompts at once, padded on the left, special tokens left out.

    Args:
        model: in evaluation mode.
        tokenizer: has a pad token.
        prompts: token ids, from `prompt_ids`.
        args: how tokens are chosen.

    Returns:
        an answer for each prompt, under greedy decoding the one it would get alone.
    """
    import torch

    tokenizer.padding_side = "left"
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(model.device)
    rooms = [room_for(model, prompt, args) for prompt in prompts]
    with torch.inference_mode():
        output = model.generate(**batch, **options_of(args, max(rooms)))
    new = output[:, batch["input_ids"].shape[1] :]
    answers = [row[:room] for row, room in zip(new, rooms, strict=True)]
    return tokenizer.batch_decode(answers, skip_special_tokens=True)
