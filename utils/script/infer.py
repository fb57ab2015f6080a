"""Chats with a trained model, or answers the rows of a file, in the format it was trained on.

python -m utils.script.infer --model_path output/sft-20260101-120000                             # chat; /help in it
python -m utils.script.infer --model_path output/sft-20260101-120000 --prompt "Who are you?"     # one answer
python -m utils.script.infer --model_path output/sft-20260101-120000 --input rows.jsonl --output answers.jsonl

Rows may have any form that can be trained on; an answer in a row is kept as "reference". Each line of the output is
{"file", "line", "messages", "answer"}, with "tools" and "reference" if the row has them. "messages" ends with the
answer, so the file can be used for training, or answered again, as it is. Answers are written to <output>.partial as
they come: after an interruption the same command continues. The finished file has them in the order of the rows.
"""

from utils.config.flags import make_parser, read_flags
from utils.infer.answer_rows import InferArgs, answer_rows, check_infer
from utils.infer.chat import Chat, run_chat
from utils.infer.load import Parts, allows_special, check_trained, load_for_inference, make_base
from utils.runtime.command import run_command
from utils.runtime.errors import raise_if_any
from utils.runtime.log import setup_logging


def parse(argv: list[str] | None = None) -> tuple[InferArgs, Parts]:
    """Reads the flags.

    Returns:
        the flags, and the base and adapters they name.

    Raises:
        UserError: with every problem at once.
    """
    values, given, problems = read_flags(make_parser([InferArgs], "utils.script.infer", __doc__), argv)
    args = InferArgs(**values)
    parts, found = check_trained(args)
    raise_if_any(problems + found + check_infer(args, given))
    return args, make_base(args, parts)


def load_chat(args: InferArgs, parts: Parts) -> Chat:
    """Loads a model for chatting."""
    return Chat(*load_for_inference(args, parts, args.dtype), args, args.system, allows_special(parts))


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args, parts = parse(argv)
    if args.input is not None:
        answer_rows(args, parts)
        return
    chat = load_chat(args, parts)
    if args.prompt is not None:
        chat.answer(args.prompt)
    else:
        run_chat(chat)


if __name__ == "__main__":
    run_command(main)
