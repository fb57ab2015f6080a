"""Commands for the settings that the search proposes."""

import pytest

from utils.memory import Setting
from utils.memory.search import command_of


@pytest.mark.parametrize(
    ("setting", "gpus", "command"),
    [
        (Setting("lora", "none", False), 1, "python main_train.py --max_len 64"),
        (Setting("lora", "zero3", True), 2,
         "deepspeed --num_gpus 2 main_train.py --max_len 64 --gradient_checkpointing true --deepspeed zero3"),
        (Setting("qlora", "none", False), 2,
         "torchrun --nproc_per_node 2 main_train.py --max_len 64 --train_mode qlora"),
        (Setting("dora", "zero2_offload", False), 1,
         "python main_train.py --max_len 64 --train_mode lora --use_dora true --deepspeed zero2_offload"),
    ],
)  # fmt: skip
def test_the_command_of_a_setting(setting, gpus, command):
    given = ["--max_len", "64", "--deepspeed", "zero1"]
    assert command_of(setting, Setting("lora", "zero1", False), given, gpus) == command
