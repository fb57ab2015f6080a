"""The families that people ask for, small: trained and compared with plain transformers as by benchmarks/architectures.

Each trains two steps in this process. The loss in the run's layout, padded and of rows one by one is the same, as are
the gradients, and the saved model has the logits and greedy answers of the one in memory.
"""

import json

import pytest

from benchmarks.architectures import RESULTS
from benchmarks.architectures_models import prepare
from benchmarks.architectures_table import FAMILIES, kind_of
from benchmarks.architectures_work import train

LINES = {line["architecture"]: line for line in json.loads(RESULTS.read_text(encoding="utf-8"))["models"]}
FULL = (
    "qwen3", "qwen3_moe", "qwen3_5_text", "llama", "gemma3_text", "gemma4_text", "phi3", "glm4", "glm4_moe", "gpt_oss",
    "deepseek_v3", "mistral", "lfm2", "cohere2", "nemotron_h", "internlm3", "smollm3", "mixtral", "olmoe",
)  # fmt: skip
LORA = ("qwen3_moe", "gpt_oss", "nemotron_h")  # also merged


@pytest.mark.parametrize(("mode", "kind"), [*(("full", kind) for kind in FULL), *(("lora", kind) for kind in LORA)])
def test_a_family_is_trained_as_by_plain_transformers(mode, kind, tmp_path):
    base, rows = prepare(kind, tmp_path)
    found = train(mode, base, tmp_path, rows)
    assert found["problems"] == [] and found["generates"] == {}
    assert kind_of(found) == kind_of(LINES[kind][mode])
    assert mode == "full" or isinstance(found["merged"], float)


def test_the_families_are_architectures_of_the_results():
    named = {kind for kinds in FAMILIES.values() for kind in kinds}
    assert named <= {kind for kind, line in LINES.items() if "not_built" not in line}
    assert {*FULL, *LORA} <= named
