"""Talks to a trained model, or answers a file of rows, in the format it was trained on.

python -m utils.script.infer --model_path output/sft-20260101-120000                             # chat; /help in it
python -m utils.script.infer --model_path output/sft-20260101-120000 --prompt "Who are you?"     # one answer
python -m utils.script.infer --model_path output/sft-20260101-120000 --input rows.jsonl --output answers.jsonl

Rows may have any form that is trained on, with or without an answer, which then is kept as "reference". Each line of
the output is {"file", "line", "messages", "answer"}, with "tools" and "reference" where there are any. "messages" ends
with the answer, so that the file can be trained on, and answered again, as it is. Answers are kept in
<output>.partial as they come, and the same command goes on after a kill; at the end they stand in the order of the
rows.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from loguru import logger

from utils.config.flags import arg, make_parser, read_flags
from utils.data.files import find_files
from utils.infer.answer_file import AnswerFile, check_output, partial_of
from utils.infer.chat import Chat, talk
from utils.infer.generate import GenerateArgs, answer_all, check_generate, prompt_ids
from utils.infer.load import Parts, TrainedArgs, allows_special, check_trained, load_for_inference, load_format
from utils.infer.prompts import Prompt, read_prompts
from utils.runtime.command import run_command
from utils.runtime.errors import Problem, UserError, raise_if_any
from utils.runtime.log import setup_logging
from utils.storage.files import sha256_of
from utils.storage.weights import weights_fingerprint

_SHOWN = 100  # so many rows that cannot be answered are named


@dataclass
class InferArgs(GenerateArgs, TrainedArgs):
    """Flags of this command."""

    prompt: str | None = arg(None, "Answer this once and end, instead of chatting.")
    system: str | None = arg(None, "The system message, for rows that have none. Default: the format's own.")
    dtype: Literal["auto", "float32", "bfloat16"] = arg(
        "auto",
        "The type of the weights; auto: as they are saved. In float32 a row's answer does not depend on its batch.",
    )
    input: str | None = arg(
        None, "Rows to answer: .jsonl, .json, .csv, .parquet, a folder, a glob; separated by commas."
    )
    output: str | None = arg(None, "The .jsonl file for the answers.")
    batch_size: int = arg(8, "The most rows that are answered at once.")
    on_bad_row: Literal["drop", "error"] = arg(
        "drop",
        "A row without a prompt, of a form the chat format refuses, or longer than the context: drop names it and goes "
        "on; error names all and ends before the model is loaded.",
    )
    overwrite: bool = arg(False, "Replace --output, and what was begun for it with other flags.")


def parse(argv: list[str] | None = None) -> tuple[InferArgs, Parts]:
    """Reads the flags.

    Returns:
        the flags, and the base and adapters they mean.

    Raises:
        UserError: with every problem at once.
    """
    values, given, problems = read_flags(make_parser([InferArgs], "utils.script.infer", __doc__), argv)
    args = InferArgs(**values)
    parts, found = check_trained(args)
    raise_if_any(problems + found + check_generate(args) + _check_files(args, given))
    return args, parts


def _check_files(args: InferArgs, given: set[str]) -> list[str]:
    problems = []
    if args.prompt is not None and not args.prompt.strip():
        problems.append(f"--prompt {args.prompt!r} is empty; give a text, or leave it out to chat")
    if args.batch_size < 1:
        problems.append(f"--batch_size {args.batch_size} is not allowed; give a whole number of at least 1")
    if args.input is None:
        only = [f"--{name}" for name in ("output", "batch_size", "on_bad_row", "overwrite") if name in given]
        return problems + ([f"{', '.join(only)} without --input; give the rows as --input"] if only else [])
    if args.prompt is not None:
        problems.append("--prompt and --input are both given; give one of them")
    files, found = find_files(args.input, "--input")
    problems += found
    if args.output is None:
        problems.append("--output is missing; give the .jsonl file for the answers to --input")
    elif Path(args.output).resolve() in [Path(file).resolve() for file in files]:
        problems.append(f"--output {args.output!r} is one of the files of --input; give another file")
    else:
        problems += check_output(args.output, args.overwrite)
    return problems


def load_chat(args: InferArgs, parts: Parts) -> Chat:
    """Loads a model for chatting."""
    return Chat(*load_for_inference(args, parts, args.dtype), args, args.system, allows_special(parts))


def answer_rows(args: InferArgs, parts: Parts) -> None:
    """Answers the rows of `--input` into `--output`.

    Raises:
        UserError: a file cannot be used, or none of the rows can be answered.
    """
    from tqdm import tqdm

    prompts, problems = read_prompts(args.input, "--input")
    prompts = [_with_system(prompt, args.system) for prompt in prompts]
    tokenizer = load_format(args, parts)
    ids = _ids_of_all(args, parts, tokenizer, prompts, problems)
    files, _ = find_files(args.input, "--input")
    problems.sort(key=lambda problem: (files.index(problem.file), problem.line))  # those found while reading come first
    _tell_problems(args, problems, len(ids))
    file = AnswerFile(args.output, settings_of(args, parts), set(ids), args.overwrite)
    try:
        left = [number for number in ids if number not in file.done]
        if left:  # else it was killed after the last answer
            model, _ = load_for_inference(args, parts, args.dtype, tokenizer)
            found = answer_all(model, tokenizer, [ids[number] for number in left], args, args.batch_size, seeds=left)
            for place, answer in tqdm(found, total=len(ids), initial=len(file.done), unit="row", desc="answering"):
                file.write(left[place], row_of(prompts[left[place]], answer))
        file.finish()
    except KeyboardInterrupt:
        logger.info("{:,} answers are in {}; the same command goes on", len(file.done), partial_of(args.output))
        raise
    finally:
        file.close()
    skipped = f"; {len(problems):,} rows have none and are named above" if problems else ""
    logger.info("{:,} answers in {}{}", len(ids), args.output, skipped)


def _with_system(prompt: Prompt, system: str | None) -> Prompt:
    if not system or prompt.messages[0]["role"] == "system":
        return prompt
    messages = [{"role": "system", "content": system}, *prompt.messages]
    return Prompt(prompt.file, prompt.line, messages, prompt.tools, prompt.reference)


def _ids_of_all(
    args: InferArgs, parts: Parts, tokenizer, prompts: list[Prompt], problems: list[Problem]
) -> dict[int, list[int]]:
    """The token ids of each prompt by its number; what cannot be answered goes to `problems`."""
    from transformers import AutoConfig

    # the weights are not needed for this, and take long to load
    stand_in = SimpleNamespace(config=AutoConfig.from_pretrained(parts.base, trust_remote_code=args.trust_remote_code))
    special, found = allows_special(parts), {}
    for number, prompt in enumerate(prompts):
        try:
            found[number] = prompt_ids(stand_in, tokenizer, prompt.messages, prompt.tools, special)
        except UserError as error:
            message = f"{prompt.file}:{prompt.line} {error.problems[0]}"
            problems.append(Problem(message, file=prompt.file, line=prompt.line))
    return found


def _tell_problems(args: InferArgs, problems: list[Problem], answerable: int) -> None:
    if not problems and answerable:
        return
    shown = "".join(f"\n  {problem}" for problem in problems[:_SHOWN])
    more = f"\n  … and {len(problems) - _SHOWN:,} more" if len(problems) > _SHOWN else ""
    counted = f"{len(problems):,} of {len(problems) + answerable:,} rows"
    if not answerable:
        raise UserError(f"none of the rows of --input {args.input!r} can be answered:{shown or ' it has none'}{more}")
    if args.on_bad_row == "error":
        raise UserError(f"{counted} cannot be answered, and --on_bad_row error is given:{shown}{more}")
    logger.warning("{} cannot be answered and are left out:{}{}", counted, shown, more)


def settings_of(args: InferArgs, parts: Parts) -> dict:
    """What decides the answers, by the names that a message can use."""
    flags = {"--" + name: value for name, value in asdict(GenerateArgs(**_only(args, GenerateArgs))).items()}
    if not args.do_sample:
        for name in ("--temperature", "--top_p", "--top_k", "--seed"):
            del flags[name]
    flags |= {f"--{name}": getattr(args, name) for name in ("system", "dtype", "template_name")}
    weights = [f"{path} (weights {weights_fingerprint(path)})" for path in (parts.base, *parts.adapters)]
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
    home = Path(parts.last())
    names += tuple(str(file.relative_to(home)) for file in sorted(home.glob("additional_chat_templates/*.jinja")))
    hashes = {f"the content of {name}": _hash_of(home / name) for name in names if (home / name).is_file()}
    files, _ = find_files(args.input, "--input")
    read = {f"the content of --input {file}": _hash_of(file) for file in files}
    return {"the model": " + ".join(weights)} | hashes | read | flags


def _only(args: InferArgs, kind: type) -> dict:
    return {name: getattr(args, name) for name in kind.__dataclass_fields__}


def _hash_of(file: str | Path) -> str:
    return sha256_of(file)[:16]


def row_of(prompt: Prompt, answer: str) -> dict:
    """A line of the output: an SFT row, and what else is known of it."""
    row = {"file": prompt.file, "line": prompt.line}
    row["messages"] = [*prompt.messages, {"role": "assistant", "content": answer}]
    row |= {"tools": prompt.tools} if prompt.tools else {}
    row["answer"] = answer
    return row | ({"reference": prompt.reference} if prompt.reference is not None else {})


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
        talk(chat)


if __name__ == "__main__":
    run_command(main)
