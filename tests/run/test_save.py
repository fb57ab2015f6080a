"""What a run saves, for each architecture and each way to train: plain transformers and PEFT load the same model.

The merge of each adapter is compared here as well, so that its run is trained once.
"""

import json

import pytest
import tiny
import torch
from merging import check_merge
from modes import MODES, logits_of
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

CASES = [
    (architecture, mode)
    for architecture in tiny.ARCHITECTURES
    for mode in MODES
    if architecture == "qwen2" or mode not in ("rspissa", "qdora")
]
CASES += [(name, "lora") for name in tiny.VARIANTS]


def reload(folder, base_folder, mode):
    """Loads a run as a user without this project would."""
    options = {"dtype": torch.float32}
    if mode == "full":
        return AutoModelForCausalLM.from_pretrained(folder, **options)
    if mode in ("qlora", "qdora"):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    base = AutoModelForCausalLM.from_pretrained(base_folder, **options)
    for module in base.modules():
        # bitsandbytes' inference path on a CPU rounds its scales to bf16: near, but not the same
        module.support_avx512bf16_for_cpu = False
    return PeftModel.from_pretrained(base, folder)


@pytest.mark.parametrize(("architecture", "mode"), CASES)
def test_a_saved_run_and_its_merge_have_the_trained_logits(architecture, mode, train, tiny_models, monkeypatch):
    """The trained model in memory, the same loaded by plain transformers and PEFT, and the base, compared by logits."""
    import utils.run.save

    kept = {}
    finish = utils.run.save.finish_run
    monkeypatch.setattr(
        utils.run.save, "finish_run", lambda trainer, *rest: (kept.update(trainer=trainer), finish(trainer, *rest))[1]
    )
    base_folder = tiny_models(architecture)
    more = ["--train_special_tokens", "off"] if architecture == "phi_bias" else []  # refused, since its head has a bias
    folder = train("--precision", "fp32", "--learning_rate", "1e-2", *MODES[mode], *more, model=base_folder)
    trained = logits_of(kept["trainer"].model)
    again = logits_of(reload(folder, base_folder, mode))
    base = logits_of(AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32))
    # a QLoRA adapter is kept in bf16 in memory; the files hold what it is
    tolerance = 1e-4 if "pissa" in mode else 1e-5
    torch.testing.assert_close(again, trained, rtol=tolerance, atol=tolerance)
    assert (trained - base).abs().max() > 1e-2
    losses = [
        entry["loss"]
        for entry in json.loads((folder / "trainer_state.json").read_text())["log_history"]
        if "loss" in entry
    ]
    if architecture == "qwen2" or mode != "rslora":  # at its lower rate four steps may be too few
        assert losses[-1] < losses[0]
    if mode != "full":
        check_merge(base_folder, folder)


def test_the_saved_tokenizer_has_the_chat_template_and_the_stop_token(trained):
    folder = trained()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    stops = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert stops[0] == tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id
