"""Numbers, trackers and combinations that are refused."""

import pytest
from parsing import problems_of


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--train_mode", "full", "--use_dora", "true"], "--use_dora True needs an adapter"),
        (["--train_mode", "full", "--init_lora_weights", "pissa"], "--init_lora_weights pissa needs an adapter"),
        (["--train_mode", "full", "--loraplus_lr_ratio", "16"], "--loraplus_lr_ratio 16.0 needs an adapter"),
        (["--train_mode", "qlora", "--init_lora_weights", "pissa"], "quantised"),
        (["--task_type", "pretrain"], "does not fit the recipe"),
        (["--max_length", "100"], "use --max_len"),
        (["--precision", "fp32", "--bf16", "true"], "contradicts"),
        (["--precision", "fp16"], "CUDA"),
        (["--train_args_path", "train_args/sft/bse.py"], "train_args/sft/base.py"),
        (["--eval_strategy", "steps"], "--eval_data_path or --val_size"),
        (["--eval_on_start", "true"], "--eval_on_start true"),
        (["--val_size", "2.5"], "a share below 1 or a number of rows"),
        (["--resume_from_checkpoint", "nowhere"], "'nowhere' is not a checkpoint"),
        (["--resume_from_checkpoint", "true"], "holds no complete checkpoint"),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size 0"),
        (["--learning_rate", "-1"], "--learning_rate -1.0"),
        (["--num_train_epochs", "0"], "trains nothing"),
        (["--num_train_epochs", "1e30"], "never ends; give a number above 0 and at most 1,000,000"),
        (
            ["--group_by_length", "true"],
            "--group_by_length is not a flag. It is --train_sampling_strategy group_by_length",
        ),
        (["--report_to", "tensorbord"], "Did you mean 'tensorboard'"),
        (["--report_to", "tensorboard", "tensorbord"], "--report_to 'tensorbord' is not installed. Did you mean"),
        (["--report_to", "none", "tensorboard"], "--report_to none tensorboard: 'none' cannot be combined with others"),
        (["--packing", "true", "--padding_free", "false"], "--packing true needs --padding_free true"),
        (["--lora_alpha", "inf"], "--lora_alpha inf is not allowed; give a number above 0"),
        (["--lora_alpha", "nan"], "--lora_alpha nan is not allowed"),
        (["--warmup_steps"], "--warmup_steps"),
        (["stray"], "stray"),
    ],
)
def test_what_is_refused_and_how(parse, flags, said):
    assert said in "\n".join(problems_of(parse, *flags))


def test_several_trackers(parse, monkeypatch):
    from transformers import integrations

    monkeypatch.setattr(integrations, "get_available_reporting_integrations", lambda: ["tensorboard", "wandb"])
    assert parse("--report_to", "wandb", "tensorboard", "--seed", "7")[1].report_to == ["wandb", "tensorboard"]
    for word, wanted in (("none", []), ("tensorboard", ["tensorboard"])):
        assert parse("--report_to", word)[1].report_to == wanted


def test_accelerates_sequence_parallelism_is_refused_and_data_parallelism_is_not(parse, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_SHARD_SIZE", "2")
    parse()
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_SIZE", "2")
    monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", "2")
    found = " ".join(problems_of(parse, "--lora_rank", "0"))
    assert "parallelism_config_sp_size 2: sequence parallelism is not supported" in found
    assert "tensor parallelism" in found and "--lora_rank 0" in found


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ('{"state_dict_type": "SHARDED_STATE_DICT"}', "give FULL_STATE_DICT"),
        ('{"version": 7}', "version 7"),
        ('{"reshard_after_forwrd": true}', "Did you mean 'reshard_after_forward'"),
    ],
)
def test_an_fsdp_config_that_transformers_would_ignore_is_refused(parse, config, named):
    parse("--fsdp", "full_shard", "--fsdp_config", '{"version": 2, "reshard_after_forward": false}')
    assert named in " ".join(problems_of(parse, "--fsdp", "full_shard", "--fsdp_config", config))
