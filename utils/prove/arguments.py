"""The arguments that proofs run under: those of main_train.py, with what would disturb a comparison switched off."""

from pathlib import Path

from loguru import logger

from utils.args import parse_args

# proofs compute in float32 and in their own folders; of a flag that is given twice the last value counts
_OVERRIDES = [
    "--precision", "fp32", "--bf16", "false", "--fp16", "false", "--overwrite_output_dir", "false",
    "--resume_from_checkpoint", "false", "--report_to", "none", "--push_to_hub", "false", "--card_samples", "0",
    "--eval_data_path", "", "--val_size", "0", "--eval_strategy", "no", "--load_best_model_at_end", "false",
    "--early_stopping_patience", "0",
]  # fmt: skip
_SINGLE_PROCESS = ["--deepspeed", "none", "--fsdp", ""]


def make_subject(flags: list[str], count: int, scratch: Path):
    """Reads main_train.py's flags, overrides those that a proof cannot run with, and prepares the rows.

    Args:
        flags: main_train.py's, as given.
        count: how many rows are used.
        scratch: a folder that is removed afterwards.

    Returns:
        utils.prove.subject.Subject

    Raises:
        UserError: with every problem of the flags, or rows that cannot be used.
    """
    own = ["--output_dir", str(scratch / "run"), *_OVERRIDES]
    args, train_args = parse_args([*flags, *own, *_SINGLE_PROCESS])

    from utils.prove.subject import Subject
    from utils.runtime.log import route_library_logs

    route_library_logs()
    if args.attn_implementation == "flash_attention_2":
        logger.info("flash attention has no float32; the proofs use --attn_implementation sdpa")
        args.attn_implementation = "sdpa"
        own += ["--attn_implementation", "sdpa"]
    if hasattr(train_args, "packing"):
        train_args.packing = False  # the proof of packing packs its rows itself
        own += ["--packing", "false"]
    if train_args.neftune_noise_alpha is not None:
        own += ["--neftune_noise_alpha", "0"]  # with noise on the embeddings no two steps are alike
    train_args.precompute_ref_log_probs = False
    train_args._n_gpu = min(train_args.n_gpu, 1)  # the proof of two ranks starts its own processes
    dropout, args.lora_dropout = args.lora_dropout, 0.0
    return Subject(args, train_args, count, dropout, [*flags, *own], scratch)
