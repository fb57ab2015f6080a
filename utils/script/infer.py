"""Talks to a trained model, in the format it was trained on.

python -m utils.script.infer --model_path output/sft-20260101-120000
python -m utils.script.infer --model_path output/sft-20260101-120000 --prompt "Who are you?"
"""

import sys
from dataclasses import dataclass

from utils.errors import raise_if_any, run_command
from utils.flags import arg, make_parser, read_flags
from utils.generate import GenerateArgs, check_generate, options_of, prompt_ids, room_for
from utils.log import setup_logging
from utils.trained import Parts, TrainedArgs, check_trained, load_speaker


@dataclass
class InferArgs(GenerateArgs, TrainedArgs):
    """Flags of the chat."""

    prompt: str | None = arg(None, "Answer this once and end, instead of chatting.")
    system: str | None = arg(None, "The system message. Default: the format's own.")


def parse(argv: list[str] | None = None) -> tuple[InferArgs, Parts]:
    """Reads the flags.

    Returns:
        the flags, and the base and adapters they mean.

    Raises:
        UserError: with every problem at once.
    """
    values, _, problems = read_flags(make_parser([InferArgs], "utils.script.infer", __doc__), argv)
    args = InferArgs(**values)
    parts, found = check_trained(args)
    problems += found + check_generate(args)
    raise_if_any(problems)
    return args, parts


class Chat:
    """A model, its tokenizer and the conversation so far.

    Args:
        model: for generation.
        tokenizer: with a chat template.
        args: InferArgs.
    """

    def __init__(self, model, tokenizer, args: InferArgs):
        self.model, self.tokenizer, self.args = model, tokenizer, args
        self.messages = [{"role": "system", "content": args.system}] if args.system else []

    def answer(self, prompt: str, stream: bool = True) -> str:
        """Generates the answer to `prompt` and keeps both turns.

        Args:
            prompt: what the user says.
            stream: whether to print the answer as it comes.
        """
        import torch
        from transformers import TextStreamer

        messages = [*self.messages, {"role": "user", "content": prompt}]
        ids = prompt_ids(self.model, self.tokenizer, messages)
        inputs = torch.tensor([ids], device=self.model.device)
        options = options_of(self.args, room_for(self.model, ids, self.args))
        if stream:
            options["streamer"] = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        with torch.inference_mode():
            output = self.model.generate(inputs, attention_mask=torch.ones_like(inputs), **options)
        text = self.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
        self.messages = [*messages, {"role": "assistant", "content": text}]
        return text


def load_chat(args: InferArgs, parts: Parts) -> Chat:
    """Loads a model for chatting."""
    from transformers import set_seed

    set_seed(args.seed)
    return Chat(*load_speaker(args, parts), args)


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args, parts = parse(argv)
    chat = load_chat(args, parts)
    if args.prompt is not None:
        chat.answer(args.prompt)
        return
    mark = ""
    if sys.stdin.isatty():
        import readline  # noqa: F401  (gives input() editing and a history)

        mark = "> "
    print("Say something; Ctrl-D ends, Ctrl-C stops an answer.", file=sys.stderr)
    while True:
        try:
            prompt = input(mark).strip()
        except EOFError:
            print(file=sys.stderr)
            return
        if not prompt:
            continue
        try:
            chat.answer(prompt)
        except KeyboardInterrupt:
            print("\n(stopped; this turn is forgotten)", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
