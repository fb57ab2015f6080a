"""Generates answers: encodes conversations, batches prompts, and samples each row with its own seed."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

from loguru import logger

from utils.config.flags import arg
from utils.infer.batching import Batching, batching_of
from utils.model.generation_config import own_generation
from utils.model.rope import positions_of
from utils.runtime.errors import UserError, first_line
from utils.template.tokenize import (
    Segment,
    encode_segments,
    escape_messages,
    escape_patterns,
    escape_special_tokens,
    pick_escape_char,
)


@dataclass
class GenerateArgs:
    """Flags of generation, named as in transformers' `generate`."""

    max_new_tokens: int = arg(512, "The largest number of tokens of an answer.")
    do_sample: bool = arg(False, "Sample instead of greedy decoding.")
    temperature: float = arg(0.7, "With --do_sample: below 1 makes likely tokens likelier, above 1 less likely.")
    top_p: float = arg(0.9, "With --do_sample: sample from the likeliest tokens that together have this probability.")
    top_k: int = arg(0, "With --do_sample: sample from so many of the likeliest tokens; 0 for all.")
    repetition_penalty: float = arg(1.0, "Above 1 makes tokens that already occur less likely.")
    num_beams: int = arg(1, "The number of beams of a beam search; 1 for none.")
    seed: int = arg(42, "With --do_sample: the same seed gives the same answers.")


def check_generate(args: GenerateArgs) -> list[str]:
    """The problems of the generation flags."""
    allowed = {
        "max_new_tokens": (args.max_new_tokens >= 1, "a whole number of at least 1"),
        "temperature": (0 < args.temperature < math.inf, "a number above 0, or --do_sample false"),
        "top_p": (0 < args.top_p <= 1, "a number above 0, at most 1"),
        "top_k": (args.top_k >= 0, "a whole number of at least 0"),
        "repetition_penalty": (0 < args.repetition_penalty < math.inf, "a number above 0"),
        "num_beams": (args.num_beams >= 1, "a whole number of at least 1"),
        "seed": (args.seed >= 0, "a whole number of at least 0"),
    }
    problems = [
        f"--{name} {getattr(args, name)} is not allowed; give {text}"
        for name, (fine, text) in allowed.items()
        if not fine
    ]
    if args.do_sample and args.num_beams > 1:
        problems.append(f"--do_sample true and --num_beams {args.num_beams} do not go together; give one of them")
    return problems


def context_of(config) -> int | None:
    """The context length in the model's configuration, in tokens; None if it has none."""
    return positions_of(config)


def room_for(model, prompt: list[int], args: GenerateArgs) -> int:
    """The largest length of an answer: `--max_new_tokens`, or what is left of the model's context."""
    context = context_of(model.config)
    return args.max_new_tokens if context is None else min(args.max_new_tokens, context - len(prompt))


def prompt_ids(
    model, tokenizer, messages: list[dict], tools: list | None = None, allow_special: bool = False
) -> list[int]:
    """The token ids of a conversation with the prompt for its answer, by the tokenizer's chat template.

    As in training, the text of a special token within a message is encoded as plain text.

    Args:
        model: the model, or another object with its `config`.
        tokenizer: has a chat template.
        messages: the conversation, the question last.
        tools: descriptions of tools.
        allow_special: whether it is encoded as the token, as with `--allow_special_tokens_in_content true` in training.

    Raises:
        UserError: the format refuses the conversation, or it fills the model's context.
    """
    from jinja2 import TemplateError

    form = tokenizer.get_chat_template(tools=tools)
    for name, given in (("tools", tools), ("tool_calls", any("tool_calls" in message for message in messages))):
        if given and name not in form:
            raise UserError(f"the model's chat format does not support {name}; leave them out, or use another model")
    mark = None
    if not allow_special:
        mark, breaks = (
            pick_escape_char(json.dumps([messages, tools], ensure_ascii=False)),
            escape_patterns(tokenizer, form),
        )
        messages, tools = escape_messages(messages, breaks, mark), escape_special_tokens(tools, breaks.others, mark)
    try:
        text = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
    except (TemplateError, TypeError, ValueError) as error:  # such as tools with other keys than the template reads
        raise UserError(f"the model's chat format refuses the conversation: {error}") from error
    ids = encode_segments([[Segment(text)]], tokenizer, allow_special=True, escape_chars=[mark])[0]["input_ids"]
    context = context_of(model.config)
    if context and len(ids) >= context:
        raise UserError(f"the prompt has {len(ids):,} tokens, and the model's context is {context:,}; shorten it")
    return ids


def answer_all(
    model, tokenizer, prompts: list[list[int]], args: GenerateArgs, batch_size: int, seeds: list[int] | None = None,
    cut: list[int] | None = None,
) -> Iterator[tuple[int, str]]:  # fmt: skip
    """Answers many prompts, in batches of similar length, the longest first, padded on the left.

    In float32 an answer does not depend on the other prompts of its batch, also with `do_sample`: each prompt has its
    own random numbers, from `args.seed` and its number. In bfloat16 rounding depends on the batch, and may change
    which of two nearly equal tokens is the likeliest.

    Args:
        model: in evaluation mode.
        tokenizer: has a pad token.
        prompts: token ids, from `prompt_ids`.
        args: how tokens are chosen.
        batch_size: the largest number of prompts answered at once.
        seeds: a number for each prompt, to seed its random numbers. Default: its index in `prompts`.
        cut: gets the indices of the answers that end without a stop token.

    Yields:
        (index in `prompts`, answer without special tokens), batch by batch.

    Raises:
        UserError: a batch does not fit the device's memory.
    """
    for places in _batches(model, prompts, args, batch_size):
        batch = [prompts[place] for place in places]
        numbers = [place if seeds is None else seeds[place] for place in places]
        for place, ids in zip(places, generate_ids(model, tokenizer, batch, args, numbers), strict=True):
            if cut is not None and is_cut(model, ids, room_for(model, prompts[place], args)):
                cut.append(place)
            yield place, text_of(tokenizer, ids)


def is_cut(model, ids: list[int], room: int) -> bool:
    """Whether an answer of at most `room` tokens has no stop token."""
    stops = model.generation_config.eos_token_id
    return len(ids) >= room and not set(stops if isinstance(stops, list) else [stops]) & set(ids)


def report_cut(name: str, cut: list[int], count: int, args: GenerateArgs) -> None:
    """Warns of answers that were cut off, out of `count`."""
    if cut:
        logger.warning(
            "{}: {:,} of {:,} answers were cut off by --max_new_tokens {:,} or by the model's context",
            name, len(cut), count, args.max_new_tokens,
        )  # fmt: skip


def _batches(model, prompts: list[list[int]], args: GenerateArgs, batch_size: int) -> Iterator[list[int]]:
    """Indices of prompts that the model can answer together, with the same limit on the answer's length."""
    batching = batching_of(model, prompts) if min(batch_size, len(prompts)) > 1 else Batching.ANY
    batch_size = 1 if batching is Batching.SINGLE else batch_size
    alike = batching is Batching.EQUAL
    batch: list[int] = []
    kind = None
    for place in sorted(range(len(prompts)), key=lambda place: -len(prompts[place])):
        # near the end of the context, longer prompts leave room for shorter answers
        kind, before = (room_for(model, prompts[place], args), len(prompts[place]) if alike else 0), kind
        if batch and (len(batch) == batch_size or kind != before):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def generate_ids(
    model, tokenizer, prompts: list[list[int]], args: GenerateArgs, seeds: list[int], streamer=None
) -> list[list[int]]:
    """Answers prompts of one batch, all with the same limit on the answer's length.

    Args:
        model: in evaluation mode.
        tokenizer: has a pad token.
        prompts: token ids; shorter ones are padded on the left.
        args: how tokens are chosen.
        seeds: a number for each prompt, for its random numbers.
        streamer: transformers' TextStreamer, for one prompt.

    Returns:
        for each prompt the ids of its answer: with its stop token if there is one, then padding.

    Raises:
        UserError: the batch does not fit the device's memory, or the model's code cannot generate.
    """
    import torch

    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
    width = batch["input_ids"].shape[1]
    options = _options(model, args, seeds, [width - len(prompt) for prompt in prompts])
    options |= {"max_new_tokens": room_for(model, max(prompts, key=len), args)}
    options |= {"pad_token_id": tokenizer.pad_token_id, "streamer": streamer}
    try:
        with torch.inference_mode(), own_generation(model):
            output = model.generate(**batch, **options)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{len(prompts):,} prompts of up to {width:,} tokens do not fit the GPU's memory together with their "
            "answers; give a smaller --batch_size, or a smaller --max_new_tokens"
        ) from error
    except (OSError, UserError):  # of a streamer that cannot print
        raise
    except Exception as error:  # each model's code raises its own
        raise UserError(f"transformers cannot generate with {type(model).__name__}: {first_line(error)}") from error
    return output[:, width:].tolist()


def text_of(tokenizer, ids: list[int]) -> str:
    """Decodes an answer without special tokens, keeping every space."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _options(model, args: GenerateArgs, seeds: list[int], padding: list[int]) -> dict:
    """The flags as keyword arguments of `generate`.

    Sampling is done by the Gumbel-max trick (Gumbel 1954): the argmax of logits + Gumbel noise is a sample from their
    softmax. So each row can have its own noise, whatever batch it is in.
    """
    import torch
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    steps = LogitsProcessorList()
    if args.repetition_penalty != 1:
        # padding must not count as tokens that already occur
        ignored = torch.tensor(padding).repeat_interleave(args.num_beams)
        steps.append(RepetitionPenaltyLogitsProcessor(args.repetition_penalty, prompt_ignore_length=ignored))
    if args.do_sample:
        steps.append(TemperatureLogitsWarper(args.temperature))
        if args.top_k:
            steps.append(TopKLogitsWarper(args.top_k))
        if args.top_p < 1:
            steps.append(TopPLogitsWarper(args.top_p))
        steps.append(_Noise(args.seed, seeds, model.device))
    return {"do_sample": False, "num_beams": args.num_beams, "use_cache": True, "logits_processor": steps}


class _Noise:
    """A logits processor that adds Gumbel noise, each row with its own generator.

    Args:
        seed: shared by all rows.
        numbers: one for each row.
        device: that of the logits.
    """

    def __init__(self, seed: int, numbers: list[int], device):
        import numpy
        import torch

        self.generators = [torch.Generator(device) for _ in numbers]
        for generator, number in zip(self.generators, numbers, strict=True):
            generator.manual_seed(int(numpy.random.SeedSequence((seed, number)).generate_state(1)[0]))

    def __call__(self, input_ids, scores):
        """`scores` of shape (rows, vocabulary)."""
        import torch

        for row, generator in zip(scores, self.generators, strict=True):
            noise = torch.empty_like(row).exponential_(generator=generator)
            row -= noise.clamp_(min=torch.finfo(noise.dtype).tiny).log_()
        return scores
