"""The generation settings saved with a model: the base's own, and the trained stop token first."""

import json

import pytest
import tiny


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_the_base_s_sampling_settings_and_stop_tokens_are_kept(mode, train, tmp_path):
    """As older Llama-2 chats have it: a temperature without do_sample, which transformers will not save."""
    base = tiny.save_tiny_model(tmp_path / "base")
    config = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": [0, 7], "pad_token_id": 0}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(config))
    folder = train("--train_mode", mode, model=base)
    saved = json.loads((folder / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [2, 0, 7]
    assert saved["temperature"] == 0.6
    assert (folder / "train_args.json").exists()
