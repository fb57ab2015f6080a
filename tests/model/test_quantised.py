"""Bases that are saved quantised: trained as they are, unpacked, or refused before their weights load."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from conftest import write_rows
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import main_train
from utils.infer.load import TrainedArgs, check_trained, load_trained
from utils.script.infer import main as infer
from utils.script.merge_lora import main as merge_lora

# what the 4 bits of MXFP4 stand for: a sign and e2m1 (OCP Microscaling Formats, section 5.3.3)
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
FP4 += [-value for value in FP4]


@pytest.fixture(scope="module")
def in_4_bits(tmp_path_factory):
    """A base that bitsandbytes saved in 4 bits, to be computed in float16, as many are published."""
    folder = tmp_path_factory.mktemp("base")
    whole = tiny.save_tiny_model(folder / "whole", "qwen2")
    options = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float16"
    )
    model = AutoModelForCausalLM.from_pretrained(whole, quantization_config=options, dtype=torch.bfloat16)
    model.save_pretrained(folder / "saved")
    tiny.byte_level_tokenizer().save_pretrained(folder / "saved")
    return str(folder / "saved")


def adapter_of(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_a_base_in_4_bits_is_trained_as_qlora(mode, train, in_4_bits, tmp_path, capsys):
    """The same adapter as QLoRA on the model it was made from: the weights in 4 bits are the same."""
    rows = write_rows(tmp_path / "eval.jsonl", tiny.ROWS[:2])
    flags = ["--max_steps", "3", "--precision", "bf16", "--eval_data_path", rows, "--eval_strategy", "steps"]
    flags += ["--eval_steps", "1", "--train_special_tokens", "off"]
    folder = train("--train_mode", mode, *flags, model=in_4_bits)
    said = capsys.readouterr().err
    assert ("is saved in 4 bits, so --train_mode lora is qlora here" in said) == (mode == "lora")
    assert json.loads((folder / "train_args.json").read_text())["common"]["train_mode"] == "qlora"
    wanted = train("--train_mode", "qlora", *flags, model=str(Path(in_4_bits).parent / "whole"), output="from_whole")
    found, wanted = adapter_of(folder), adapter_of(wanted)
    assert found.keys() == wanted.keys()
    for name, weight in found.items():
        assert torch.equal(weight, wanted[name]), name


def test_an_adapter_on_a_base_in_4_bits_answers_and_is_not_merged(train, in_4_bits, tmp_path, refused):
    folder = train("--max_steps", "2", "--precision", "fp32", "--learning_rate", "1e-2", model=in_4_bits)
    rows = write_rows(tmp_path / "questions.jsonl", tiny.ROWS[:3])
    out = tmp_path / "answers.jsonl"
    infer(["--model_path", str(folder), "--input", rows, "--output", str(out), "--max_new_tokens", "2"])
    assert len(out.read_text(encoding="utf-8").splitlines()) == 3
    args = TrainedArgs(model_path=str(folder))
    model = load_trained(args, check_trained(args)[0])
    ids = torch.tensor([[5, 6, 7, 8]])
    before = model(ids).logits
    torch.testing.assert_close(model(ids).logits, before, atol=0, rtol=0)  # a look does not repack the weights
    with model.disable_adapter():
        assert not torch.equal(model(ids).logits, before)
    said = refused(merge_lora, "--model_path", str(folder), "--output_dir", str(tmp_path / "merged"))
    assert "saved quantised (bitsandbytes_4bit)" in said and "--base_model" in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--train_mode", "full"], "--train_mode full cannot change the weights"),
        (["--init_lora_weights", "pissa"], "--init_lora_weights pissa factorises the base's weights"),
    ],
)
def test_what_a_base_in_4_bits_cannot_do_is_refused_before_it_loads(
    flags, said, in_4_bits, refused, rows_file, tmp_path, monkeypatch
):
    def loads(*_, **__):
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loads)
    run = ["--model_name_or_path", in_4_bits, "--train_data_path", rows_file, "--output_dir", str(tmp_path / "run")]
    told = refused(main_train.main, *run, *flags)
    assert said in told and told.count(in_4_bits) == 1


@pytest.mark.parametrize(
    ("quantisation", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantised (gptq)"),
        ({"quant_method": "awq"}, "quantised (awq)"),
        ({"quant_method": "fp8"}, "quantised (fp8)"),
        ({"quant_method": "compressed-tensors"}, "quantised (compressed-tensors)"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "in 8 bits (bitsandbytes)"),
        ({"bits": 2}, "quantised (in an unnamed way)"),
    ],
)
@pytest.mark.parametrize("mode", ["full", "lora", "qlora"])
def test_other_quantisations_are_refused_by_name(quantisation, said, mode, refused, rows_file, tmp_path):
    base = Path(tiny.save_tiny_model(tmp_path / "base"))
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": quantisation}
    (base / "config.json").write_text(json.dumps(config))
    run = ["--model_name_or_path", str(base), "--train_data_path", rows_file, "--output_dir", str(tmp_path / "run")]
    told = refused(main_train.main, *run, "--train_mode", mode)
    assert f"is saved {said}, which is not trained here; give the model it was made from" in told


@pytest.fixture
def in_mxfp4(tmp_path):
    """A tiny gpt-oss with its experts in MXFP4, and what they stand for: unpacked by hand."""
    whole = tiny.save_tiny_model(tmp_path / "whole", "gpt_oss", num_local_experts=4, num_experts_per_tok=2)
    saved = tmp_path / "saved"
    weights, unpacked = load_file(f"{whole}/model.safetensors"), {}
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = weights.pop(name).shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 122, (experts, outputs, inputs // 32), dtype=torch.uint8)
        weights |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        pairs = torch.stack([blocks & 15, blocks >> 4], dim=-1).long()  # the low half is the first number
        values = torch.tensor(FP4)[pairs].flatten(-2) * torch.exp2(scales.float() - 127)[..., None]
        unpacked[name] = values.flatten(-2).transpose(1, 2)
    saved.mkdir()
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    config = json.loads(Path(whole, "config.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (saved / "config.json").write_text(json.dumps(config))
    tiny.byte_level_tokenizer().save_pretrained(saved)
    return str(saved), unpacked


def test_experts_in_mxfp4_are_unpacked_and_trained(in_mxfp4, train, capsys):
    base, unpacked = in_mxfp4
    rate = ["--learning_rate", "1e-30", "--max_steps", "1", "--precision", "fp32"]
    folder = train("--train_mode", "full", *rate, model=base)
    assert "is saved in MXFP4; its experts are unpacked" in capsys.readouterr().err
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    for name, values in unpacked.items():
        torch.testing.assert_close(found[name], values, atol=0, rtol=0, msg=name)
    assert (train("--max_steps", "1", model=base, output="lora") / "adapter_model.safetensors").exists()


def test_mxfp4_is_not_quantised_once_more(in_mxfp4, refused, rows_file, tmp_path):
    run = ["--model_name_or_path", in_mxfp4[0], "--train_data_path", rows_file, "--output_dir", str(tmp_path / "run")]
    assert "use --train_mode lora, which unpacks them" in refused(main_train.main, *run, "--train_mode", "qlora")


def test_a_plan_for_a_base_in_4_bits_has_qlora_alone(in_4_bits, capsys, monkeypatch):
    from utils.memory.activations import Activations
    from utils.script import plan_memory

    monkeypatch.setattr("utils.memory.planner.step_bytes", lambda *_: Activations(1, 1, 1, 1, 1))
    plan_memory.main(["--model_name_or_path", in_4_bits, "--json", "true"])
    plan = json.loads(capsys.readouterr().out)
    assert {row["mode"] for row in plan["settings"]} == {"qlora"}
    packed = AutoModelForCausalLM.from_pretrained(in_4_bits)
    states = [weight.quant_state for weight in packed.parameters() if hasattr(weight, "quant_state")]
    held = sum(weight.numel() * weight.element_size() for weight in packed.parameters())
    scales = [t for s in states for t in (s.absmax, s.code, s.offset, s.state2.absmax, s.state2.code)]
    held += sum(scale.numel() * scale.element_size() for scale in scales)
    row = plan["settings"][0]
    assert row["parameters"] - row["gradients"] == held


def test_the_doctor_has_nothing_against_packed_weights(in_4_bits, rows_file, tmp_path, capsys):
    from utils.script import doctor

    run = ["--model_name_or_path", in_4_bits, "--train_data_path", rows_file, "--output_dir", str(tmp_path / "run")]
    doctor.main(["--json", "true", *run])
    assert "ARGUMENTS" not in {finding["code"] for finding in json.loads(capsys.readouterr().out)["findings"]}
