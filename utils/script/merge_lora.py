"""Merges a trained adapter into its base: full weights that load without PEFT, and a Modelfile for Ollama.

python -m utils.script.merge_lora --model_path output/sft-20260101-120000 --output_dir output/merged
python -m utils.script.merge_lora --model_path output/merged --modelfile true
"""

from loguru import logger

from utils.config.flags import make_parser, read_flags
from utils.export.arguments import MergeArgs, check_merge
from utils.export.merge import add_modelfile, merge
from utils.export.merge_folder import check_output_dir
from utils.export.modelfile import NAME
from utils.infer.load import Parts, check_trained, make_base
from utils.runtime.command import run_command
from utils.runtime.errors import raise_if_any
from utils.runtime.log import route_library_logs, setup_logging
from utils.storage.run_lock import hold_lock, lock_path_for


def parse(argv: list[str] | None = None) -> tuple[MergeArgs, Parts]:
    """Reads the flags.

    Returns:
        the flags, and the base and adapters they name.

    Raises:
        UserError: with every problem at once.
    """
    values, _, problems = read_flags(make_parser([MergeArgs], "utils.script.merge_lora", __doc__), argv)
    args = MergeArgs(**values)
    parts, found = check_trained(args)
    raise_if_any(problems + found + check_merge(args, parts, readable=not found))
    made = make_base(args, parts)
    if made != parts:  # its size is known now
        raise_if_any(check_merge(args, made, readable=True))
    return args, made


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args, parts = parse(argv)
    route_library_logs()
    lines = []
    if parts.adapters:
        with hold_lock(lock_path_for(args.output_dir), f"--output_dir {args.output_dir!r}"):
            # another merge into the folder may have ended since the flags were checked
            raise_if_any(check_output_dir(args.output_dir, args.overwrite, parts, args.dtype, sized=False))
            folder = merge(args, parts)
        lines += ["merged: {0}", "talk to it:\n  python -m utils.script.infer --model_path {0}"]
    else:
        folder = add_modelfile(args, parts)
    if args.modelfile:
        lines.append("make an Ollama model of it:\n  ollama create my-model -f {0}/" + NAME)
    logger.info("\n".join(lines), folder)


if __name__ == "__main__":
    run_command(main)
