"""Checks of `--streaming true`: settings that need all rows at once, or another order of rows, are refused by name."""

from utils.data.sources import is_mixture
from utils.runtime.errors import Problem, refusal


def validate(settings) -> list[Problem]:
    """Returns a problem for each setting that cannot be combined with `--streaming true`."""
    common, train_args = settings.common, settings.train_args
    problems = []
    if common.shuffle_buffer < 1:
        problems += refusal(
            f"--shuffle_buffer {common.shuffle_buffer} is not allowed; give a whole number of at least 1, or "
            "--train_sampling_strategy sequential for the order of the files",
            "shuffle_buffer",
        )
    if not common.streaming:
        return problems
    if common.val_size:
        problems += _refuse("val_size", common.val_size, "draws from all rows; give --eval_data_path")
    if getattr(train_args, "packing", False):
        problems += _refuse(
            "packing", "true", "decides the number of steps, which needs all lengths; give --packing false, and "
            "--padding_free true computes no padding either"
        )  # fmt: skip
    if getattr(train_args, "precompute_ref_log_probs", False):
        problems += _refuse("precompute_ref_log_probs", "true", "stores a number for each row; leave it out")
    if common.row_ledger:
        problems += _refuse("row_ledger", "true", "keeps the losses of all rows in memory; leave it out")
    if is_mixture(common):
        problems += _refuse("train_data_path", repr(common.train_data_path), "draws from all rows; give plain files")
    if common.curriculum != "none":
        problems += _refuse("curriculum", common.curriculum, "sorts all rows; leave it out")
    strategy = train_args.train_sampling_strategy
    if strategy not in ("random", "sequential"):
        problems += _refuse("train_sampling_strategy", strategy, "sorts all rows; give random or sequential")
    if not train_args.dataloader_in_order:
        problems += _refuse("dataloader_in_order", "false", "cannot be resumed exactly; leave it out")
    config = train_args.accelerator_config
    if config.split_batches or config.dispatch_batches or not config.even_batches:
        why = "divides batches in another way; leave out split_batches, dispatch_batches and even_batches"
        problems += _refuse("accelerator_config", train_args.accelerator_config.to_dict(), why)
    return problems


def _refuse(name: str, value, why: str) -> list[Problem]:
    return refusal(f"--{name} {value} cannot be combined with --streaming true: it {why}", name, "streaming")
