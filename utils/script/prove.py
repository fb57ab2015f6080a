"""Proves on your own model and rows what a training relies on, before it costs anything.

python -m utils.script.prove                                            # the embedded model on its sample rows
python -m utils.script.prove --model_name_or_path Qwen/Qwen1.5-7B-Chat --train_data_path my_rows.jsonl --max_len 512
python -m utils.script.prove --only padding_free packed stops --rows 4  # and any flag of main_train.py
python -m utils.script.prove --list

Each proof comes to the same figures in two ways and prints both, their difference, and what rounding may make of it.
Everything is computed in float32, on a few of your rows, and nothing is left behind. Exit code 0: every proof holds
that applies; 1: one does not; 2: the input cannot be used.
"""

import json
import math
import signal
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from loguru import logger

from utils.args import parse_args
from utils.config.flags import arg, make_parser, read_flags, split_own
from utils.prove.figures import Count
from utils.runtime.command import run_command
from utils.runtime.distributed import world_size
from utils.runtime.errors import nearest, raise_if_any
from utils.runtime.log import setup_logging

# a proof computes in float32 and in folders of its own; the flags given last count
_OF_ALL = [
    "--precision", "fp32", "--bf16", "false", "--fp16", "false", "--overwrite_output_dir", "false",
    "--resume_from_checkpoint", "false", "--report_to", "none", "--push_to_hub", "false", "--card_samples", "0",
    "--eval_data_path", "", "--val_size", "0", "--eval_strategy", "no", "--load_best_model_at_end", "false",
    "--early_stopping_patience", "0",
]  # fmt: skip
_NOT_IN_THIS_PROCESS = ["--deepspeed", "none", "--fsdp", ""]


@dataclass
class ProveArgs:
    """Flags of this command; all others are main_train.py's, and mean what they mean there."""

    only: list[str] | None = arg(None, "The proofs to try, by name; see --list. Default: all.")
    rows: int = arg(8, "How many rows are used, of different lengths.")
    list: bool = arg(False, "Say what each proof shows, how, and how far its figures may be apart; try none.")
    json: bool = arg(False, "Print one JSON object at the end rather than lines.")


def parse(argv: list[str] | None = None) -> tuple[ProveArgs, list[str]]:
    """Reads this command's own flags.

    Returns:
        them, and the rest, which are main_train.py's.

    Raises:
        UserError: with every problem at once.
    """
    from utils.prove.registry import PROOFS

    mine, rest = split_own(argv, ProveArgs)
    values, _, problems = read_flags(make_parser([ProveArgs], "utils.script.prove", __doc__), mine)
    args = ProveArgs(**values)
    for name in args.only or []:
        if name not in PROOFS:
            problems.append(f"--only {name!r} is no proof.{nearest(name, PROOFS)} Allowed: {', '.join(PROOFS)}")
    if args.rows < 2:
        problems.append(f"--rows {args.rows} is not allowed; give a whole number of at least 2")
    if world_size() > 1:
        problems.append("prove starts the processes it needs by itself; start it by plain python, without a launcher")
    raise_if_any(problems)
    return args, rest


def settle(flags: list[str], count: int, scratch: Path):
    """Reads main_train.py's flags, sets what the proofs need otherwise, and prepares the rows.

    Args:
        flags: main_train.py's, as given.
        count: how many rows are used.
        scratch: a folder that is removed afterwards.

    Returns:
        utils.prove.subject.Subject

    Raises:
        UserError: with every problem of the flags, or rows that cannot be used.
    """
    own = ["--output_dir", str(scratch / "run"), *_OF_ALL]
    args, train_args = parse_args([*flags, *own, *_NOT_IN_THIS_PROCESS])

    from utils.prove.subject import Subject
    from utils.runtime.log import route_library_logs

    route_library_logs()
    if args.attn_implementation == "flash_attention_2":
        logger.info("flash attention has no float32; the proofs use --attn_implementation sdpa")
        args.attn_implementation = "sdpa"
        own += ["--attn_implementation", "sdpa"]
    if hasattr(train_args, "packing"):
        train_args.packing = False  # rows are packed by the proof of that alone
        own += ["--packing", "false"]
    if train_args.neftune_noise_alpha is not None:
        own += ["--neftune_noise_alpha", "0"]  # noise for the embeddings: no two steps could be compared
    train_args.precompute_ref_log_probs = False
    train_args._n_gpu = min(train_args.n_gpu, 1)  # one of several is enough; the proof of two ranks takes two
    dropout, args.lora_dropout = args.lora_dropout, 0.0
    return Subject(args, train_args, count, dropout, [*flags, *own], scratch)


def show_list() -> str:
    """Every proof: what it shows, how, and the tolerance."""
    from utils.prove.registry import PROOFS

    return "\n".join(
        f"{name}: {proof.says}\n    {proof.how}\n    tolerance {proof.tolerance}" for name, proof in PROOFS.items()
    )


def lines_of(outcome) -> str:
    """A proof as it is printed: the verdict, and a line for each further figure."""
    verdict, width = outcome.verdict, 13
    mark = {True: "✓", False: "✗", None: "–"}[verdict.holds]
    head = f"{mark} {outcome.name:<{width}}{outcome.proof.says}"
    if verdict.why_not is not None:
        return f"{head}: does not apply: {verdict.why_not}"
    if verdict.failure is not None:
        return f"{head}: {verdict.failure}"
    texts = [_measure(measure) for measure in verdict.measures]
    return "\n".join([f"{head}  ({outcome.seconds:.1f} s)", *(f"    {text}" for text in texts)])


def _measure(measure) -> str:
    mark = "" if measure.holds else "  ← too far"
    if isinstance(measure, Count):
        return f"{measure.what}: {measure.found:g} {measure.unit}{mark}"
    return (
        f"{measure.what}: {measure.expected:.8g} and {measure.found:.8g}, {measure.unit} difference "
        f"{measure.difference:.1e}, tolerance {measure.tolerance:g}{mark}"
    )


def as_json(outcomes: list, subject) -> dict:
    """All that was found; `holds` is null for a proof that does not apply."""
    from utils.data.places import row_location

    return {
        "holds": all(outcome.verdict.holds is not False for outcome in outcomes),
        "model": subject.args.model_name_or_path,
        "rows": [
            {"file": subject.data.report.files[number], "line": line}
            for number, line in map(row_location, subject.rows)
        ],
        "proofs": [
            {
                "name": outcome.name,
                "says": outcome.proof.says,
                "holds": outcome.verdict.holds,
                "does_not_apply": outcome.verdict.why_not,
                "failure": outcome.verdict.failure,
                "seconds": round(outcome.seconds, 1),
                "measures": [_finite(asdict(one)) | {"holds": one.holds} for one in outcome.verdict.measures],
            }
            for outcome in outcomes
        ],
    }


def _finite(values: dict) -> dict:
    """JSON has no form for what is no number."""
    return {name: None if value != value or value in (math.inf, -math.inf) else value for name, value in values.items()}


def prove(args: ProveArgs, flags: list[str], scratch: Path) -> bool:
    """Tries the proofs and prints what they come to; returns whether all hold that apply."""
    from tqdm import tqdm

    subject = settle(flags, args.rows, scratch)

    from utils.prove.registry import PROOFS, run_proofs

    names, outcomes = args.only or list(PROOFS), []
    with tqdm(total=len(set(names)), unit="proof", leave=False) as bar:
        for outcome in run_proofs(names, subject, bar.set_description):
            outcomes.append(outcome)
            tqdm.write(lines_of(outcome), file=sys.stderr if args.json else sys.stdout)
            bar.update()
    failed = sum(outcome.verdict.holds is False for outcome in outcomes)
    if args.json:
        print(json.dumps(as_json(outcomes, subject), indent=2, ensure_ascii=False))
    else:
        held = sum(outcome.verdict.holds is True for outcome in outcomes)
        print(f"{held} hold, {failed} do not, {len(outcomes) - held - failed} do not apply")
    return not failed


def main(argv: list[str] | None = None) -> None:
    setup_logging()
    args, flags = parse(argv)
    if args.list:
        print(show_list())
        return
    # so that folders and processes are cleared away
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with tempfile.TemporaryDirectory(prefix="llm_dojo-prove-") as scratch:
            holds = prove(args, flags, Path(scratch))
    finally:
        signal.signal(signal.SIGTERM, before)
    if not holds:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
