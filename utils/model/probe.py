"""Tests which batch layouts a model computes correctly, by comparing logits before the training.

In a model that ignores `position_ids`, or has a recurrent state, concatenated rows see each other: the loss is silently
wrong. So a few short rows go through the model alone, padded and concatenated, and their logits are compared.
`utils/model/layout.py` chooses a layout by the result.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from loguru import logger

from utils.data.collate import NOT_INPUTS
from utils.data.row_type import RowType
from utils.model.probe_state import as_for_probing, is_whole, random_states, short_spans
from utils.model.small import small_model
from utils.patches.rope import use_row_rope
from utils.runtime.errors import first_line

LENGTHS = (9, 14, 11)  # of the rows, in tokens; above the width of short convolutions and probe_state.WINDOW
# relative to the largest logit; another order of summation in float32 makes a difference of about 1e-6
_TOLERANCE, _TIMES_NOISE = 1e-5, 10
_TOLERANCE_16_BIT, _TIMES_NOISE_16_BIT = 0.03, 4
_NOT_CAUSAL, _NOT_CAUSAL_16_BIT = 1e-3, 0.2
_REASONS = {
    "padded": "computes padded rows differently from rows alone",
    "end_to_end": "lets rows laid end to end see each other",
}


@dataclass(frozen=True)
class Probe:
    """The result; each reason is None if there is no fault, else it completes the sentence "the model …".

    Attributes:
        fails: why a forward pass is not possible.
        not_causal: why a token's logits depend on later tokens.
        padded: why rows padded to one length differ from rows alone.
        end_to_end: why concatenated rows differ from rows alone.
        longest: the longest causal row in tokens, if longer rows are not causal.
        differences: layout → the largest difference, relative to the largest logit.
        small: whether a small random model of the same architecture was probed instead of the weights.
    """

    fails: str | None = None
    not_causal: str | None = None
    padded: str | None = None
    end_to_end: str | None = None
    longest: int | None = None
    differences: dict | None = None
    small: bool = False


def example_rows(tokenizer, row_type: RowType) -> list[dict]:
    """Prepared rows without special tokens, for a task's collator."""
    special = set(tokenizer.added_tokens_decoder)
    size = min(len(tokenizer), 20_000)
    plain = [token for token in range(size) if token not in special] or list(range(size))
    ids = [plain[(7919 * (place + 1)) % len(plain)] for place in range(2 * sum(LENGTHS))]
    rows = []
    for length in LENGTHS:
        row, ids = ids[:length], ids[length:]
        rows.append(row_type.example(row))
    return rows


def probe(model, layouts: dict[str, Callable], rows: list[dict], auto_class: str = "AutoModelForCausalLM") -> Probe:
    """Compares the logits of rows in each layout with those of each row alone.

    Args:
        model: transformers' causal language model, or PEFT's. Model and random state are unchanged afterwards.
        layouts: `padded` and optionally `end_to_end` → collator.
        rows: for the collators.
        auto_class: the transformers class that builds the small model.

    Returns:
        the result. If the weights are sharded (ZeRO-3, FSDP), that of a small random model of the same configuration.
    """
    import torch

    small = not is_whole(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng())
        if small:
            model = small_model(model.config, auto_class=auto_class)
            if model is None:
                logger.warning("the layout of rows was not checked: the weights are sharded over several processes")
                return Probe(small=True)
            use_row_rope(model)
        precise = stack.enter_context(as_for_probing(model))
        rows = _within_vocabulary(rows, model)
        found = _compare(model, layouts, rows, precise, small)
        if found.fails or found.not_causal:
            return found
        with short_spans(model) as shortest:
            return (
                found if shortest is None else _merged(found, _compare(model, layouts, rows, precise, small), shortest)
            )


def _merged(found: Probe, near: Probe, shortest: int) -> Probe:
    """Combines the results with the model's own attention windows and with shortened ones.

    Args:
        found: with its own windows.
        near: with shortened windows.
        shortest: the smallest of its own windows, in tokens.
    """
    if near.fails:  # modules may have copied the size when they were built
        return found
    if near.not_causal:
        beyond = f"chooses what to attend to among the tokens of all rows where they are more than {shortest:,}"
        return replace(found, end_to_end=found.end_to_end or beyond, longest=shortest)
    worst = {name: max(found.differences[name], near.differences.get(name, 0.0)) for name in found.differences}
    padded, end_to_end = found.padded or near.padded, found.end_to_end or near.end_to_end
    return replace(found, padded=padded, end_to_end=end_to_end, differences=worst)


def _compare(model, layouts: dict[str, Callable], rows: list[dict], precise: bool, small: bool) -> Probe:
    device = next(model.parameters()).device
    batches = {name: _inputs(collate, rows, device) for name, collate in layouts.items()}
    ids = [batches["padded"]["input_ids"][place] for place in _rows_of(batches["padded"])]

    def forward(**inputs):
        return model(use_cache=False, **inputs).logits.float()

    try:
        alone = _rows_alone(model, forward, ids)
    except Exception as error:  # every model's code raises its own
        return Probe(fails=f"cannot compute a short row: {first_line(error)}", small=small)
    largest = max(float(logits.abs().max()) for logits in alone.values())
    if not (0 < largest < float("inf")):
        return Probe(fails=f"computes logits that are not finite numbers above 0 ({largest})", small=small)
    noise = _rounding(forward, ids, alone, largest)
    if noise > (_NOT_CAUSAL if precise else _NOT_CAUSAL_16_BIT):
        what = f"lets a token see those after it (logits differ by {noise:.2g} of the largest), so it is not causal"
        return Probe(not_causal=what, differences={"longer": noise}, small=small)
    least, times = (_TOLERANCE, _TIMES_NOISE) if precise else (_TOLERANCE_16_BIT, _TIMES_NOISE_16_BIT)
    tolerance = max(least, times * noise)
    differences, reasons = {"longer": noise}, {}
    for name, batch in batches.items():
        try:
            differences[name] = _layout_difference(forward, batch, alone, largest)
            if name == "end_to_end" and differences[name] <= tolerance and not precise:
                differences[name] = max(differences[name], _leak(forward, batch, _rows_of(batch), largest))
        except Exception as error:
            reasons[name] = f"cannot compute {name.replace('_', ' ')} rows: {first_line(error)}"
            continue
        if not differences[name] <= tolerance:
            reasons[name] = f"{_REASONS[name]} (logits differ by {differences[name]:.2g} of the largest)"
    return Probe(
        padded=reasons.get("padded"), end_to_end=reasons.get("end_to_end"), differences=differences, small=small
    )


def _rows_alone(model, forward, ids: list) -> dict[tuple, Any]:
    """The logits of each row alone, by its tokens; in evaluation mode if training mode draws random numbers.

    The generators' state shows that; the logits may not, as a router that draws its experts may draw the same ones in
    many calls.
    """
    before = random_states(ids[0].device)
    forward(input_ids=ids[0][None])
    if before != random_states(ids[0].device):
        model.eval()
    return {tuple(row.tolist()): forward(input_ids=row[None])[0] for row in ids}


def _rounding(forward, ids: list, alone: dict, largest: float) -> float:
    """The largest difference of a row's logits from those as the start of a longer row: rounding in another shape."""
    import torch

    longer = {row: forward(input_ids=torch.cat([row, ids[0]])[None])[0, : len(row)] for row in ids}
    return max(_from_alone(logits, alone, row, largest) for row, logits in longer.items())


def _layout_difference(forward, batch: dict, alone: dict, largest: float) -> float:
    logits = forward(**batch)
    return max(_from_alone(logits[place], alone, batch["input_ids"][place], largest) for place in _rows_of(batch))


def _leak(forward, batch: dict, places: list, largest: float) -> float:
    """Tests whether other tokens in the first row change the later rows; rounding to 16 bits may hide a small leak.

    The same shapes are rounded in the same way, except in a mixture of experts, which groups the tokens differently.
    Other tokens in the last row measure that, as no earlier row can depend on them.

    Returns:
        infinity if later rows depend on the first, else 0.
    """
    before = forward(**batch)

    def change(place) -> list[float]:
        ids = batch["input_ids"].clone()
        ids[place] = ids[place].flip(0)
        after = forward(**{**batch, "input_ids": ids})
        return [_difference(after[other], before[other], largest) for other in places]

    rounding, later = max(change(places[-1])[:-1]), max(change(places[0])[1:])
    return float("inf") if later > 4 * rounding else 0.0


def _inputs(collate: Callable, rows: list[dict], device) -> dict:
    """The model's inputs of a step."""
    batch = {name: value for name, value in collate(rows).items() if name not in NOT_INPUTS}
    return {name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items()}


def _rows_of(batch: dict) -> list[tuple]:
    """The index of each row in the batch's tensors: `(0, slice(9, 23))`."""
    import torch

    if "attention_mask" in batch:
        return [(number, slice(0, int(mask.sum()))) for number, mask in enumerate(batch["attention_mask"])]
    positions = batch["position_ids"][0]
    starts = [*torch.nonzero(positions == 0).flatten().tolist(), len(positions)]
    return [(0, slice(start, end)) for start, end in zip(starts, starts[1:], strict=False)]


def _from_alone(logits, alone: dict, ids, largest: float) -> float:
    expected = alone.get(tuple(ids.tolist()))  # None if the positions do not show where a row starts
    return float("inf") if expected is None else _difference(logits, expected, largest)


def _difference(found, expected, largest: float) -> float:
    return float((found - expected).abs().max()) / largest


def _within_vocabulary(rows: list[dict], model) -> list[dict]:
    """The same rows, with ids within the vocabulary of a small model."""
    size = model.get_input_embeddings().weight.shape[0]
    lists = [value for row in rows for value in row.values() if _are_ids(value)]
    if all(token < size for ids in lists for token in ids):
        return rows
    return [
        {name: [5 + token % (size - 5) for token in value] if _are_ids(value) else value for name, value in row.items()}
        for row in rows
    ]


def _are_ids(value) -> bool:
    return isinstance(value, list) and all(isinstance(token, int) for token in value)
