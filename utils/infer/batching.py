"""Tests which prompts a model answers correctly in one batch, by comparing logits before the first batch.

A shorter prompt is padded on the left. A model that ignores the attention mask, or counts positions from the padding,
then answers it differently than alone, and some models of transformers 5.23 mix the rows of any batch.
"""

import contextlib
import enum
from weakref import WeakKeyDictionary

from loguru import logger

from utils.model.generation_config import own_generation
from utils.model.probe_state import as_for_probing, is_whole
from utils.patches.rope import depends_on_length

LENGTHS = (5, 9)  # of the prompts, in tokens
_NEW_TOKENS = 2  # from the prompt, and from the cache
_TOLERANCE, _TOLERANCE_16_BIT = 1e-4, 0.03  # relative to the largest logit, as in utils/model/probe.py


class Batching(enum.Enum):
    """Which prompts are answered in one batch, for the log."""

    ANY = "prompts of all lengths"
    EQUAL = "only prompts of the same length"
    SINGLE = "no prompts"


_FOUND: WeakKeyDictionary = WeakKeyDictionary()  # model → Batching


def batching_of(model, prompts: list[list[int]]) -> Batching:
    """Finds out which prompts may share a batch; a model is tested once.

    Args:
        model: in evaluation mode; unchanged afterwards.
        prompts: token ids, whose first tokens are used.
    """
    if depends_on_length(model.config.get_text_config()):
        return Batching.EQUAL
    if not is_whole(model):  # sharded over processes
        return Batching.ANY
    if model not in _FOUND:
        _FOUND[model] = _test(model, prompts)
    return _FOUND[model]


def _test(model, prompts: list[list[int]]) -> Batching:
    import torch

    tokens = [token for prompt in prompts for token in prompt[: sum(LENGTHS)]]
    tokens = (tokens * sum(LENGTHS))[: sum(LENGTHS)]
    short, long = tokens[: LENGTHS[0]], tokens[LENGTHS[0] :]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())
        precise = stack.enter_context(as_for_probing(model))
        if precise:
            stack.enter_context(torch.autocast(model.device.type, enabled=False))
        model.eval()
        try:
            alone = [_answer(model, [prompt])[0] for prompt in (short, long)]
        except Exception:  # the answers themselves will raise it
            return Batching.ANY
        padded = _differs(model, [short, long], alone, precise)
        if padded is None:
            return Batching.ANY
        equal = _differs(model, [long, long[::-1]], [alone[1]], precise)
    found = Batching.EQUAL if equal is None else Batching.SINGLE
    logger.info("{} are answered in one batch: the model {}", found.value, padded if equal is None else equal)
    return found


def _differs(model, prompts: list[list[int]], alone: list, precise: bool) -> str | None:
    """Why a batch's answers differ from those of prompts alone, for "the model …"; None if they do not.

    Args:
        model, prompts: the batch.
        alone: of its first prompts, from `_answer`.
        precise: whether the model computes in float32.
    """
    what = "padded on the left" if len(set(map(len, prompts))) > 1 else "in a batch"
    try:
        found = _answer(model, prompts)
    except Exception as error:  # each model's code raises its own
        return f"cannot answer prompts {what} ({type(error).__name__})"
    difference = max(_difference(*pair) for pair in zip(found, alone, strict=False))
    if difference <= (_TOLERANCE if precise else _TOLERANCE_16_BIT):
        return None
    return f"answers prompts {what} differently than alone (logits differ by {difference:.2g} of the largest)"


def _answer(model, prompts: list[list[int]]) -> list[list[tuple]]:
    """The greedy tokens of each prompt, and the logits that each was chosen by: `[[(token, [V]), …], …]`."""
    import torch

    width = max(map(len, prompts))
    ids = torch.tensor([[prompt[0]] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"max_new_tokens": _NEW_TOKENS, "min_new_tokens": _NEW_TOKENS, "do_sample": False, "use_cache": True}
    with torch.inference_mode(), own_generation(model):
        output = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), **options, pad_token_id=prompts[0][0],
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    steps = zip(output.sequences[:, width:].T, output.logits, strict=True)
    chosen = [list(zip(tokens.tolist(), logits.float(), strict=True)) for tokens, logits in steps]
    return [list(row) for row in zip(*chosen, strict=True)]


def _difference(found: list[tuple], alone: list[tuple]) -> float:
    """The largest difference of the logits, relative to the largest, up to the first other token."""
    worst = 0.0
    for (token, logits), (expected_token, expected) in zip(found, alone, strict=True):
        difference = float((logits - expected).abs().max() / expected.abs().max())
        worst = max(worst, difference if difference == difference else float("inf"))
        if token != expected_token:
            break
    return worst
