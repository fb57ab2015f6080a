"""How long the rows are that --max_len cuts or leaves out, so that the right figure is known."""

from utils.data_files import parse_row, raw_rows
from utils.data_pairs import to_pair
from utils.data_report import split_place
from utils.data_rows import to_messages, to_text


def measured(places: dict[str, list[int]], files: list[str], args, template, tokenizer) -> str:
    """How long rows are that were too long: the first hundred of each file, as the report names them.

    `"; 44 of them measured: 1,025 to 3,204 tokens"`

    Args:
        places: `"file reason"` → lines.
        files: the report's.
        args: CommonArgs.
        template: the chat template; None for plain text.
        tokenizer: the rows' own.
    """
    counts = []
    for place, lines in places.items():
        counts += _lengths(split_place(place, files)[0], set(lines), args, template, tokenizer)
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
    allow = args.allow_special_tokens_in_content
    if args.task_type == "pretrain":
        encoded = tokenizer([to_text(value) for value in values], return_attention_mask=False)["input_ids"]
        return [(len(ids) + 1, 0) for ids in encoded]  # each ends with the eos token
    if args.task_type == "sft":
        rows = template.encode_batch([to_messages(value) for value in values], tokenizer, allow)
        return [(len(row["input_ids"]), 0) for row in rows]
    pairs = [to_pair(value) for value in values]
    prompts = template.encode_batch([pair["prompt"] for pair in pairs], tokenizer, allow)
    sides = [
        template.encode_batch([pair["prompt"] + pair[side] for pair in pairs], tokenizer, allow)
        for side in ("chosen", "rejected")
    ]
    return [
        (max(len(chosen["input_ids"]), len(rejected["input_ids"])), len(prompt["input_ids"]))
        for prompt, chosen, rejected in zip(prompts, *sides, strict=True)
    ]
