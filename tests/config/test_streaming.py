"""`--streaming true`: what needs all rows at once is refused by name, before anything is read."""

import pytest

from utils.runtime.errors import UserError

STREAM = ["--streaming", "true"]
PAIRS = ["--train_args_path", "train_args/dpo/base.py", "--train_data_path", "data/dpo_single_data.jsonl"]


@pytest.mark.parametrize("flags", [
    ["--val_size", "2"], ["--packing", "true", "--padding_free", "true"], ["--row_ledger", "true"],
    ["--train_sampling_strategy", "group_by_length"], ["--train_sampling_strategy", "batch_rebalance"],
    ["--curriculum", "length"], ["--train_data_path", "data/sft_data.jsonl:2,data/sft_eval_data.jsonl:1"],
    ["--dataloader_in_order", "false"], ["--accelerator_config", '{"even_batches": false}'],
    ["--accelerator_config", '{"split_batches": true}'], ["--shuffle_buffer", "0"],
    ["--precompute_ref_log_probs", "true", *PAIRS],
], ids=" ".join)  # fmt: skip
def test_what_needs_all_rows_is_refused_by_name(parse, flags):
    parse(*[flag for flag in flags if flag not in ("--shuffle_buffer", "0")])  # alone it is allowed
    with pytest.raises(UserError) as error:
        parse(*STREAM, *flags)
    (problem,) = error.value.problems
    assert flags[0].removeprefix("--") in problem.flags
    assert str(problem).startswith(f"{flags[0]} ") and ";" in str(problem)  # with a remedy


def test_what_can_be_combined_is_not_refused(parse):
    args, _ = parse(*STREAM, "--padding_free", "true", "--train_sampling_strategy", "sequential")
    assert args.streaming and args.shuffle_buffer == 10_000
    parse(*STREAM, *PAIRS)


def test_a_buffer_below_one_is_refused_without_streaming_too(parse):
    with pytest.raises(UserError):
        parse("--shuffle_buffer", "-1")
