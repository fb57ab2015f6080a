"""Generates a few answers before and after the training, for the run's card."""

from dataclasses import dataclass

from loguru import logger

from utils.data.row_type import RowType
from utils.infer.generate import GenerateArgs, answer_all, room_for, text_of
from utils.model.generation_config import own_generation
from utils.runtime.distributed import uses_fsdp, zero_stage
from utils.template.tokenize import IGNORE_INDEX

LONGEST = 64  # tokens of an answer: enough to see a difference, and fast
_BEGINNING = 32  # tokens of a plain text that the model continues


@dataclass
class Sample:
    """A prompt from the data, and the model's answers to it.

    Attributes:
        ids: the prompt's tokens.
        prompt: the prompt as text, with special tokens.
        wanted: the answer in the data.
        before, after: the model's answers before and after the training; None until they are generated.
    """

    ids: list[int]
    prompt: str
    wanted: str
    before: str | None = None
    after: str | None = None


def begin_samples(trainer, args, train_args, data, tokenizer) -> tuple[list[Sample], str]:
    """Chooses the prompts and generates the answers before the training.

    With a new adapter these are the base's answers, which `end_samples` generates, so that the training starts sooner.

    Returns:
        the samples, and why there are none; empty if there are some.
    """
    if not args.card_samples:
        return [], "none were generated (`--card_samples 0`)"
    if zero_stage(train_args) == 3 or train_args.fsdp or uses_fsdp():
        return [], "the weights were divided among the processes (ZeRO-3, FSDP)"
    try:
        rows = data.train if data.eval is None else data.eval
        places = [number * len(rows) // args.card_samples for number in range(args.card_samples)]
        samples = [_sample(*split_row(rows[place], args.task.row_type), tokenizer) for place in dict.fromkeys(places)]
        chosen = [sample for sample in samples if sample.ids and room_for(trainer.model, sample.ids, _HOW) > 0]
        if not _begins_as_base(trainer.model, args):
            _answer(trainer, tokenizer, chosen, "before")
        return chosen, "" if chosen else "no row leaves room for an answer"
    except Exception as error:  # the card must never fail a run
        logger.warning("the run's card will show no answers: {}: {}", type(error).__name__, error)
        return [], f"they could not be made ({type(error).__name__})"


def _begins_as_base(model, args) -> bool:
    """Whether the model with its adapter off gives the answers before the training: a new adapter adds nothing."""
    from peft import PeftModel

    # with a PiSSA adapter off the layers give (W0 - s B0 A0) x, which is not what the base gives
    return isinstance(model, PeftModel) and not args.adapter_name_or_path and args.init_lora_weights == "default"


def end_samples(trainer, tokenizer, samples: list[Sample]) -> str:
    """Generates the answers of the trained model, and those of its base if `begin_samples` left them out.

    Returns:
        why there are no answers; empty if there are some.
    """
    try:
        _answer(trainer, tokenizer, samples, "after")
        if any(sample.before is None for sample in samples):
            with trainer.model.disable_adapter():
                _answer(trainer, tokenizer, samples, "before")
        return ""
    except Exception as error:
        logger.warning("the run's card shows no answers: {}: {}", type(error).__name__, error)
        return f"they could not be made ({type(error).__name__})"


_HOW = GenerateArgs(max_new_tokens=LONGEST)  # greedy: the same run has the same answers


def split_row(row: dict, row_type: RowType) -> tuple[list[int], list[int]]:
    """Splits a prepared row into a prompt and the first trained answer.

    `{"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, -100]}` → `([1, 2], [3])`; of a plain text the first tokens
    are the prompt.
    """
    first = row_type.sequences(row)[0]
    if first.prompt_length:
        return first.input_ids[: first.prompt_length], first.input_ids[first.prompt_length :]
    length = (row.get("seq_lengths") or [len(first.input_ids)])[0]  # packed rows: the first one
    ids, labels = first.input_ids[:length], first.labels[:length]
    start = next(place for place, label in enumerate(labels) if label != IGNORE_INDEX)
    if start == 0:
        start = min(_BEGINNING, length // 2)
        return ids[:start], ids[start : start + LONGEST]
    end = next((place for place in range(start, length) if labels[place] == IGNORE_INDEX), length)
    return ids[:start], ids[start:end]


def _sample(ids: list[int], wanted: list[int], tokenizer) -> Sample:
    # with special tokens, as the model sees the prompt
    return Sample(ids, tokenizer.decode(ids, clean_up_tokenization_spaces=False), text_of(tokenizer, wanted))


def _answer(trainer, tokenizer, samples: list[Sample], when: str) -> None:
    for sample, text in zip(samples, _answers(trainer, tokenizer, samples), strict=True):
        setattr(sample, when, text)


def _answers(trainer, tokenizer, samples: list[Sample]) -> list[str]:
    """Generates greedy answers; model and random state are unchanged afterwards."""
    import torch

    model, args = trainer.model, trainer.args
    if not getattr(model, "is_quantized", False):
        model.to(args.device)  # DeepSpeed 0.19 places the model only when it trains
    rows = min(len(samples), args.per_device_eval_batch_size) or 1
    training, cached = model.training, model.config.use_cache
    logger.disable(own_generation.__module__)  # which flags decide an answer's tokens is of no matter to a training
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        model.eval()
        model.config.use_cache = True
        with torch.random.fork_rng(devices=devices), trainer.accelerator.autocast():
            found = dict(answer_all(model, tokenizer, [sample.ids for sample in samples], _HOW, rows))
    finally:
        logger.enable(own_generation.__module__)
        model.train(training)
        model.config.use_cache = cached
    return [found[place].strip() for place in range(len(samples))]
