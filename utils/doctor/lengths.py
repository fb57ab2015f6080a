"""How long the rows are that --max_len cuts or leaves out, so that the right figure is known."""

from utils.data.conversations import to_messages, to_text
from utils.data.files import parse_row, raw_rows
from utils.data.pairs import to_pair
from utils.data.report import RowGroup
from utils.data.truncate import count_tokens


def measured(groups: list[RowGroup], args, template, tokenizer) -> str:
    """How long rows are that were too long: the first hundred of each file, as the report names them.

    `"; 44 of them measured: 1,025 to 3,204 tokens"`

    Args:
        groups: of the report.
        args: CommonArgs.
        template: the chat template; None for plain text.
        tokenizer: the rows' own.
    """
    counts = []
    for group in groups:
        counts += _lengths(group.file, set(group.lines), args, template, tokenizer)
    rows = [total for total, _ in counts]
    said = f"; {len(rows):,} of them measured: {min(rows):,} to {max(rows):,} tokens"
    if args.task_type.startswith("dpo"):
        said += f", prompts of up to {max(prompt for _, prompt in counts):,}"
    return said


def _lengths(file: str, lines: set[int], args, template, tokenizer) -> list[tuple[int, int]]:
    """Tokens of each row, and of its prompt where it is a pair."""
    values = []
    for row in raw_rows(file):
        if row.line in lines:
            values.append(parse_row(row).value)
        if row.line >= max(lines):
            break
    if args.task_type == "pretrain":
        encoded = tokenizer([to_text(value) for value in values], return_attention_mask=False)["input_ids"]
        return [(len(ids) + 1, 0) for ids in encoded]  # each ends with the eos token
    if args.task_type == "sft":
        return [(count_tokens(template.render(to_messages(value)), tokenizer), 0) for value in values]
    pairs = [to_pair(value) for value in values]
    counts = []
    for pair in pairs:
        sides = [pair["prompt"] + pair[side] for side in ("chosen", "rejected")]
        prompt, *whole = (count_tokens(template.render(turns), tokenizer) for turns in (pair["prompt"], *sides))
        counts.append((max(whole), prompt))
    return counts
