"""Talks to a trained model, in the format it was trained on.

python -m utils.script.infer --model_path output/sft-20260101-120000
python -m utils.script.infer --model_path output/sft-20260101-120000 --prompt "Who are you?"
"""

import math
import sys
from dataclasses import dataclass

from utils.check_args import check_model_path
from utils.errors import UserError, raise_if_any, run_command
from utils.flags import arg, make_parser, read_flags
from utils.log import setup_logging
from utils.template import template_dict, unknown_template


@dataclass
class InferArgs:
    """Flags of the chat; those of generation are named as in transformers' `generate`."""

    model_path: str | None = arg(None, "A run's folder (adapter or full), or a base model.")
    prompt: str | None = arg(None, "Answer this once and end, instead of chatting.")
    system: str | None = arg(None, "The system message. Default: the format's own.")
    template_name: str | None = arg(None, "The chat format of a base model. Default: the one saved with the model.")
    max_new_tokens: int = arg(512, "The longest answer in tokens.")
    do_sample: bool = arg(False, "Sample instead of taking the likeliest token each time.")
    temperature: float = arg(0.7, "With --do_sample: below 1 sharper, above 1 flatter.")
    top_p: float = arg(0.9, "With --do_sample: only the likeliest tokens with this share of the probability.")
    repetition_penalty: float = arg(1.0, "Above 1: tokens that stand already become less likely.")
    seed: int = arg(42, "With --do_sample: the same seed gives the same answers.")
    trust_remote_code: bool = arg(False, "Run Python code that comes with the model.")


def parse(argv: list[str] | None = None) -> InferArgs:
    """Reads the flags.

    Raises:
        UserError: with every problem at once.
    """
    values, _, problems = read_flags(make_parser([InferArgs], "utils.script.infer", __doc__), argv)
    args = InferArgs(**values)
    if not args.model_path:
        problems.append("--model_path is missing; give a run's folder, such as output/sft-…")
    else:
        problems += check_model_path("--model_path", args.model_path, args.trust_remote_code, adapter_allowed=True)
    if args.template_name not in (None, "auto", *template_dict):
        problems.append(unknown_template(args.template_name))
    if args.seed < 0:
        problems.append(f"--seed {args.seed} is not allowed; give a whole number of at least 0")
    if not 0 < args.repetition_penalty < math.inf:
        problems.append(f"--repetition_penalty {args.repetition_penalty} is not allowed; give a number above 0")
    if args.max_new_tokens < 1:
        problems.append(f"--max_new_tokens {args.max_new_tokens} is not allowed; give a whole number of at least 1")
    if not 0 < args.temperature < math.inf:
        problems.append(f"--temperature {args.temperature} is not allowed; give a number above 0, or --do_sample false")
    if not 0 < args.top_p <= 1:
        problems.append(f"--top_p {args.top_p} is not allowed; give a number above 0, at most 1")
    raise_if_any(problems)
    return args


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
        from jinja2 import TemplateError
        from transformers import TextStreamer

        messages = [*self.messages, {"role": "user", "content": prompt}]
        try:
            inputs = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).to(self.model.device)
        except TemplateError as error:
            raise UserError(f"the model's chat format refuses the conversation: {error}") from error
        options = {"max_new_tokens": self.args.max_new_tokens, "repetition_penalty": self.args.repetition_penalty}
        if self.args.do_sample:
            options |= {"do_sample": True, "temperature": self.args.temperature, "top_p": self.args.top_p}
        else:
            # a base may bring sampling figures, which greedy decoding would warn of
            options |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if stream:
            options["streamer"] = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        with torch.inference_mode():
            output = self.model.generate(**inputs, **options)
        text = self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        self.messages = [*messages, {"role": "assistant", "content": text}]
        return text


def load_chat(args: InferArgs) -> Chat:
    """Loads a run's folder, or a base model, for chatting."""
    from transformers import set_seed

    from utils.log import route_library_logs
    from utils.model import load_for_inference
    from utils.template import get_template
    from utils.tokenizer import load_tokenizer, set_format

    route_library_logs()
    set_seed(args.seed)
    tokenizer = load_tokenizer(args.model_path, args.trust_remote_code, flag="--model_path")
    model = load_for_inference(args.model_path, args.trust_remote_code)
    if args.template_name:
        set_format(tokenizer, get_template(args.template_name, tokenizer), model)
    elif not tokenizer.chat_template:
        raise UserError(
            f"--model_path {args.model_path!r} has no chat format of its own; give one with --template_name, "
            "or the folder of a run"
        )
    return Chat(model, tokenizer, args)


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args = parse(argv)
    chat = load_chat(args)
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
