"""The record of a run holds every value but secrets."""

from utils.args import parse_args
from utils.run.record import effective_args


def test_secrets_are_not_recorded(tiny_models, rows_file, tmp_path):
    flags = ["--model_name_or_path", tiny_models(), "--train_data_path", rows_file, "--output_dir", str(tmp_path / "x")]
    args, train_args = parse_args([*flags, "--hub_token", "hf_secret", "--learning_rate", "1e-3"])
    record = effective_args(args, train_args)
    assert "hf_secret" not in str(record) and "hub_token" not in record["trainer"]
    assert record["trainer"]["learning_rate"] == 1e-3 and record["common"]["train_data_path"] == rows_file
    assert "train_special_tokens" in record["common"]  # a name with tokens is not a secret
    assert "torch" in record["versions"]
