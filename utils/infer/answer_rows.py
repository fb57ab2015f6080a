"""Answers the rows of files into an answer file; flags of infer, and their checks."""

from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from loguru import logger

from utils.config.flags import arg
from utils.data.columns import COLUMNS_HELP, parse_columns
from utils.data.files import find_files
from utils.infer.answer_file import AnswerFile, check_output, partial_of
from utils.infer.generate import GenerateArgs, answer_all, check_generate, prompt_ids, report_cut
from utils.infer.load import Parts, TrainedArgs, allows_special, load_for_inference, load_format
from utils.infer.prompts import Prompt, read_prompts
from utils.model.rope import scaled_by_adapters
from utils.runtime.errors import Problem, UserError
from utils.storage.files import is_one_of, sha256_of
from utils.storage.weights import weights_fingerprint

_MAX_LINES_SHOWN = 100  # of rows that cannot be answered


@dataclass
class InferArgs(GenerateArgs, TrainedArgs):
    """Flags of infer."""

    prompt: str | None = arg(None, "Answer this and exit, instead of chatting.")
    system: str | None = arg(
        None, "The system message for conversations without one. Default: that of the chat format."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = arg(
        "auto",
        "The dtype of the weights; auto: as they are saved. In float32 a row's answer does not depend on its batch.",
    )
    input: str | None = arg(
        None, "Rows to answer: .jsonl, .json, .csv, .parquet, .arrow, a folder, a glob; separated by commas."
    )
    columns: str | None = arg(None, COLUMNS_HELP)
    output: str | None = arg(None, "The .jsonl file for the answers.")
    batch_size: int = arg(8, "The largest number of rows answered at once.")
    on_bad_row: Literal["drop", "error"] = arg(
        "drop",
        "For rows without a prompt, refused by the chat format, or longer than the context. drop: log and skip them; "
        "error: list them all and stop before the model is loaded.",
    )
    overwrite: bool = arg(False, "Replace --output, and unfinished answers for it made with other flags.")


def check_infer(args: InferArgs, given: set[str]) -> list:
    """The problems of the flags of infer itself; `given` are the names of those on the command line."""
    problems = check_generate(args)
    if args.prompt is not None and not args.prompt.strip():
        problems.append(f"--prompt {args.prompt!r} is empty; give a text, or leave it out to chat")
    if args.batch_size < 1:
        problems.append(f"--batch_size {args.batch_size} is not allowed; give a whole number of at least 1")
    if args.input is None:
        only = [f"--{name}" for name in ("columns", "output", "batch_size", "on_bad_row", "overwrite") if name in given]
        return problems + ([f"{', '.join(only)} without --input; give the rows as --input"] if only else [])
    if args.prompt is not None:
        problems.append("--prompt and --input are both given; give one of them")
    files, found = find_files(args.input, "--input")
    problems += found + parse_columns(args.columns)[1]
    if args.output is None:
        problems.append("--output is missing; give the .jsonl file for the answers to --input")
    elif is_one_of(args.output, files):
        problems.append(f"--output {args.output!r} is one of the files of --input; give another file")
    else:
        problems += check_output(args.output, args.overwrite)
    return problems


def answer_rows(args: InferArgs, parts: Parts) -> None:
    """Answers the rows of `--input` into `--output`.

    Raises:
        UserError: a file cannot be used, or none of the rows can be answered.
    """
    from tqdm import tqdm

    prompts, problems = read_prompts(args.input, "--input", parse_columns(args.columns)[0])
    prompts = [_with_system(prompt, args.system) for prompt in prompts]
    tokenizer = load_format(args, parts)
    ids = _encode_prompts(args, parts, tokenizer, prompts, problems)
    files, _ = find_files(args.input, "--input")
    problems.sort(key=lambda problem: (files.index(problem.file), problem.line))
    _report_bad_rows(args, problems, len(ids))
    file = AnswerFile(args.output, settings_of(args, parts), set(ids), args.overwrite)
    try:
        left = [number for number in ids if number not in file.done]
        if left:  # none if the command was killed after the last answer
            model, _ = load_for_inference(args, parts, args.dtype, tokenizer)
            cut: list[int] = []
            asked = [ids[number] for number in left]
            found = answer_all(model, tokenizer, asked, args, args.batch_size, seeds=left, cut=cut)
            for place, answer in tqdm(found, total=len(ids), initial=len(file.done), unit="row", desc="answering"):
                file.write(left[place], row_of(prompts[left[place]], answer))
            report_cut(args.output, cut, len(left), args)
        file.finish()
    except KeyboardInterrupt:
        logger.info(
            "{:,} answers are in {}; the same command continues from there", len(file.done), partial_of(args.output)
        )
        raise
    finally:
        file.close()
    skipped = f"; {len(problems):,} rows have no answer and are listed above" if problems else ""
    logger.info("{:,} answers in {}{}", len(ids), args.output, skipped)


def _with_system(prompt: Prompt, system: str | None) -> Prompt:
    if not system or prompt.messages[0]["role"] == "system":
        return prompt
    messages = [{"role": "system", "content": system}, *prompt.messages]
    return Prompt(prompt.file, prompt.line, messages, prompt.tools, prompt.reference)


def _encode_prompts(
    args: InferArgs, parts: Parts, tokenizer, prompts: list[Prompt], problems: list[Problem]
) -> dict[int, list[int]]:
    """The token ids of each prompt by its number; of one that cannot be answered, `problems` gets the reason."""
    # the configuration is enough: bad rows are reported before the weights are loaded
    config_only = SimpleNamespace(config=scaled_by_adapters(parts, args.trust_remote_code))
    special, found = allows_special(parts), {}
    for number, prompt in enumerate(prompts):
        try:
            found[number] = prompt_ids(config_only, tokenizer, prompt.messages, prompt.tools, special)
        except UserError as error:
            message = f"{prompt.file}:{prompt.line} {error.problems[0]}"
            problems.append(Problem(message, file=prompt.file, line=prompt.line))
    return found


def _report_bad_rows(args: InferArgs, problems: list[Problem], answerable: int) -> None:
    """Logs the rows that cannot be answered, or refuses them with `--on_bad_row error` or if no row is left."""
    if not problems and answerable:
        return
    shown = "".join(f"\n  {problem}" for problem in problems[:_MAX_LINES_SHOWN])
    more = f"\n  … and {len(problems) - _MAX_LINES_SHOWN:,} more" if len(problems) > _MAX_LINES_SHOWN else ""
    counted = f"{len(problems):,} of {len(problems) + answerable:,} rows"
    if not answerable:
        raise UserError(f"none of the rows of --input {args.input!r} can be answered:{shown or ' it has none'}{more}")
    if args.on_bad_row == "error":
        raise UserError(f"{counted} cannot be answered, and --on_bad_row error is given:{shown}{more}")
    logger.warning("{} cannot be answered and are skipped:{}{}", counted, shown, more)


def settings_of(args: InferArgs, parts: Parts) -> dict:
    """What the answers depend on, by the names used in messages; an answer file is continued only with the same."""
    flags = {"--" + name: value for name, value in asdict(GenerateArgs(**_only(args, GenerateArgs))).items()}
    if not args.do_sample:
        for name in ("--temperature", "--top_p", "--top_k", "--seed"):
            del flags[name]
    flags |= {f"--{name}": getattr(args, name) for name in ("system", "dtype", "template_name", "thinking")}
    flags |= {"--columns": args.columns} if args.columns else {}
    weights = [f"{path} (weights {weights_fingerprint(path)})" for path in (parts.base, *parts.adapters)]
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
    home = Path(parts.last())
    names += tuple(str(file.relative_to(home)) for file in sorted(home.glob("additional_chat_templates/*.jinja")))
    hashes = {f"the content of {name}": _hash_of(home / name) for name in names if (home / name).is_file()}
    files, _ = find_files(args.input, "--input")
    inputs = {f"the content of --input {file}": _hash_of(file) for file in files}
    return {"the model": " + ".join(weights)} | hashes | inputs | flags


def _only(args: InferArgs, kind: type) -> dict:
    return {name: getattr(args, name) for name in kind.__dataclass_fields__}


def _hash_of(file: str | Path) -> str:
    return sha256_of(file)[:16]


def row_of(prompt: Prompt, answer: str) -> dict:
    """A line of the output: an SFT row with its origin, its answer and its reference."""
    row = {"file": prompt.file, "line": prompt.line}
    row["messages"] = [*prompt.messages, {"role": "assistant", "content": answer}]
    row |= {"tools": prompt.tools} if prompt.tools else {}
    row["answer"] = answer
    return row | ({"reference": prompt.reference} if prompt.reference is not None else {})
