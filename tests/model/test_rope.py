"""`--rope_scaling`: read, applied before the weights load, and known to everything that loads the run's adapter."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import main_train
from utils.infer.load import TrainedArgs, check_trained, load_trained
from utils.model.load import load_model
from utils.model.rope import check_scaling, load_scaled_config, parse_rope_scaling, positions_of, scaled
from utils.runtime.errors import UserError

YARN = {"rope_type": "yarn", "factor": 4.0}
IDS = torch.arange(3, 60)[None]


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_json_and_the_short_form_are_read():
    assert parse_rope_scaling("yarn:4") == parse_rope_scaling('{"rope_type": "yarn", "factor": 4}') == YARN
    assert parse_rope_scaling('{"type": "linear", "factor": 2}') == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("ntk:4", "unknown rope_type 'ntk'"), ("4", "not a JSON object"), ("{yarn", "not JSON"),
        ('{"factor": 4}', "has no rope_type"), ('{"rope_type": "yarn"}', "lacks factor"),
        ('{"rope_type": "llama3", "factor": 8}', "lacks low_freq_factor, high_freq_factor"),
        ('{"rope_type": "linear", "factor": 2, "beta_fast": 3}', "has beta_fast, which linear does not read"),
        ('{"rope_type": "yarn", "factor": true}', "factor True"), ("linear:1", "extends nothing"),
        ('{"rope_type": "longrope", "factor": 2, "short_factor": [1], "long_factor": []}', "long_factor []"),
        ('{"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}', "no high_freq_factor"),
    ],
)  # fmt: skip
def test_a_value_that_transformers_would_ignore_or_break_on_is_refused(text, named):
    with pytest.raises(UserError) as error:
        parse_rope_scaling(text)
    assert named in str(error.value) and "--rope_scaling" in str(error.value)


def test_the_model_has_the_logits_of_plain_transformers_with_the_same_config(parse):
    args, train_args = parse("--rope_scaling", "yarn:4", "--precision", "fp32")
    config = AutoConfig.from_pretrained(args.model_name_or_path)
    context = config.max_position_embeddings
    plain = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=torch.float32)
    unscaled = logits(plain)
    config.rope_parameters = {"rope_theta": config.rope_parameters["rope_theta"], **YARN}
    plain.config.rope_parameters = dict(config.rope_parameters)
    assert torch.equal(logits(plain), unscaled)  # set afterwards it does nothing
    expected = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, config=config, dtype=torch.float32)
    found = load_model(args, train_args)
    assert torch.equal(logits(found), logits(expected)) and not torch.allclose(logits(found), unscaled, atol=1e-3)
    assert found.config.max_position_embeddings == positions_of(found.config) == 4 * context


def test_dynamic_scaling_computes_each_row_as_alone(parse):
    """utils/patches/rope.py finds the embeddings that the flag made depend on the length."""
    args, train_args = parse("--rope_scaling", "dynamic:3", "--precision", "fp32")
    model = load_model(args, train_args).eval()
    longest = model.config.max_position_embeddings
    ids = torch.arange(2 * (longest + 9)).reshape(2, -1) % 90 + 3
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    with torch.no_grad():
        both = model(ids, attention_mask=mask).logits
        assert torch.allclose(both[1, :20], model(ids[1:, :20]).logits[0], atol=1e-5)
        assert torch.allclose(both[0], model(ids[:1]).logits[0], atol=1e-5)
    assert positions_of(model.config) == 3 * longest


def test_of_several_kinds_of_rope_full_attention_is_scaled(tiny_models):
    path = tiny_models("gemma3_window")
    before = AutoConfig.from_pretrained(path)
    before.layer_types = ["sliding_attention", "full_attention"][: len(before.layer_types)]
    after = scaled(before, parse_rope_scaling("linear:8"), "--model_name_or_path", path)
    assert after.rope_parameters["full_attention"]["factor"] == 8.0
    assert after.rope_parameters["sliding_attention"] == before.rope_parameters["sliding_attention"]
    assert after.max_position_embeddings == positions_of(after) == 8 * before.max_position_embeddings
    with pytest.raises(UserError, match="without dynamic"):
        scaled(before, parse_rope_scaling("dynamic:8"), "--model_name_or_path", path)


def test_an_old_scaling_is_replaced_from_the_context_it_was_trained_on():
    from transformers import LlamaConfig

    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 64, "rope_theta": 5e5}  # fmt: skip
    config = LlamaConfig(max_position_embeddings=1024, rope_parameters=llama3)
    found = scaled(config, parse_rope_scaling("yarn:32"), "--model_name_or_path", "m")
    assert found.rope_parameters == {
        "rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 64, "rope_theta": 5e5,
    }  # fmt: skip
    assert found.max_position_embeddings == 2048 and config.rope_parameters == llama3
    again = scaled(found, parse_rope_scaling("yarn:32"), "--model_name_or_path", "m")
    assert again.to_dict() == found.to_dict()


def test_a_model_that_cannot_be_scaled_is_refused_with_all_other_problems(refused, tiny_models, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=2, n_layer=1, vocab_size=64)).save_pretrained(tmp_path / "gpt2")
    flags = ["--rope_scaling", "yarn:4", "--lora_rank", "0"]
    text = refused(main_train.main, "--model_name_or_path", str(tmp_path / "gpt2"), *flags)
    assert "2 errors" in text and "(gpt2) has no rotary embeddings" in text and "--lora_rank 0" in text
    longrope = '{"rope_type": "longrope", "factor": 2, "short_factor": [1], "long_factor": [1]}'
    with pytest.raises(UserError, match="short_factor has 1 numbers"):
        load_scaled_config(tiny_models(), longrope)


def test_rotary_embeddings_that_ignore_the_config_are_refused(tiny_models, monkeypatch):
    """A guess about a model is checked on its own code."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    check_scaling(tiny_models(), "yarn:4", False)
    init = Qwen2RotaryEmbedding.__init__

    def without_scaling(self, config, device=None):
        init(self, AutoConfig.from_pretrained(tiny_models()))
        self.config = config

    monkeypatch.setattr(Qwen2RotaryEmbedding, "__init__", without_scaling)
    with pytest.raises(UserError, match="do not read it"):
        check_scaling(tiny_models(), "yarn:4", False)


def test_an_adapter_is_loaded_with_the_scaling_it_was_trained_with(trained, parse, tmp_path, refused):
    """Its base's config.json has none: in plain PEFT the adapter is silently another model."""
    from peft import PeftModel

    from utils.script import merge_lora

    flags = ("--rope_scaling", "yarn:4", "--max_steps", "2", "--learning_rate", "1e-2", "--precision", "fp32",
             "--save_strategy", "steps", "--save_steps", "1")  # fmt: skip
    run = trained(*flags)
    record = json.loads((run / "train_args.json").read_text("utf-8"))
    assert record["common"]["rope_scaling"] == "yarn:4"
    assert "rope scaling" in (run / "README.md").read_text("utf-8")
    base = record["common"]["model_name_or_path"]
    expected = AutoModelForCausalLM.from_pretrained(
        base, config=load_scaled_config(base, "yarn:4"), dtype=torch.float32
    )
    expected = logits(PeftModel.from_pretrained(expected, str(run)))
    for folder in (run, run / "checkpoint-2"):
        args = TrainedArgs(model_path=str(folder))
        parts, problems = check_trained(args)
        assert not problems
        assert torch.allclose(logits(load_trained(args, parts, torch.float32)), expected, atol=1e-5)
    merge_lora.main(["--model_path", str(run), "--output_dir", str(tmp_path / "merged")])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert merged.config.rope_parameters["rope_type"] == "yarn"
    assert torch.allclose(logits(merged), expected, atol=1e-4)
    assert parse("--adapter_name_or_path", str(run), "--model_name_or_path", base)[0].rope_scaling == "yarn:4"
    text = refused(
        main_train.main, "--model_name_or_path", base, "--train_data_path", str(Path(run).parent / "rows.jsonl"),
        "--output_dir", str(tmp_path / "other"), "--max_steps", "3", "--precision", "fp32",
        "--resume_from_checkpoint", str(run / "checkpoint-1"), "--per_device_train_batch_size", "4",
    )  # fmt: skip
    assert "was made with rope_scaling yarn:4, now: None" in text


def test_a_checkpoint_alone_still_has_its_scaling(trained, tmp_path):
    import shutil

    from utils.model.rope import scaling_of_adapters

    run = trained("--rope_scaling", "yarn:4", "--max_steps", "2", "--learning_rate", "1e-2", "--precision", "fp32",
                  "--save_strategy", "steps", "--save_steps", "1")  # fmt: skip
    shutil.copytree(run / "checkpoint-2", tmp_path / "copy")
    assert scaling_of_adapters([str(tmp_path / "copy")]) == "yarn:4"
    assert scaling_of_adapters([]) is None


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        (None, 8), ({"rope_type": "default"}, 8), ({"rope_type": "linear", "factor": 2.0}, 16),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4}, 8),
        ({"full_attention": {"rope_type": "linear", "factor": 8.0}}, 8),  # Gemma-3's limit has the factor in it
    ],
)  # fmt: skip
def test_the_context_that_doctor_and_infer_go_by(rope, context):
    config = SimpleNamespace(max_position_embeddings=8, rope_parameters=rope)
    assert positions_of(SimpleNamespace(get_text_config=lambda: config)) == context
