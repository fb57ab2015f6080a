"""Loading again what was trained: adapters, chains of them, their base, and files that are damaged."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from conftest import write_rows
from safetensors.torch import load_file, save_file

from utils.infer.load import TrainedArgs, allows_special, base_of_run, check_trained, load_trained
from utils.storage.weights import check_weight_files, read_header, weights_fingerprint

IDS = torch.arange(5, 25)[None]
SPECIAL = ["--save_strategy", "steps", "--save_steps", "2", "--allow_special_tokens_in_content", "true"]


def load(**values):
    args = TrainedArgs(**{name: str(value) for name, value in values.items()})
    parts, problems = check_trained(args)
    assert not problems
    return load_trained(args, parts, torch.float32)


def problems_of(**values) -> str:
    return "\n".join(map(str, check_trained(TrainedArgs(**values))[1]))


def logits(model):
    with torch.inference_mode():
        return model(IDS.to(model.device)).logits.float().cpu()


def test_an_adapter_on_its_base_in_any_folder(trained, tiny_models, tmp_path):
    run, base = trained(), tiny_models()
    assert base_of_run(str(run)) == {"path": base, "fingerprint": weights_fingerprint(base)}
    by_run = logits(load(model_path=run))
    shutil.copytree(base, tmp_path / "moved")
    for values in (
        {"model_path": base, "adapter": run},
        {"model_path": run, "base_model": tmp_path / "moved"},
        {"model_path": tmp_path / "moved", "adapter": run},
    ):
        assert torch.equal(logits(load(**values)), by_run)
    assert not torch.equal(logits(load(model_path=base)), by_run)


def test_a_base_with_other_weights_needs_allow_other_base(trained, tiny_models, tmp_path):
    run, base = trained(), tiny_models()
    shutil.copytree(base, tmp_path / "other")
    file = tmp_path / "other" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] += 1
    save_file(weights, file, metadata={"format": "pt"})
    other = str(tmp_path / "other")
    said = problems_of(model_path=str(run), base_model=other)
    assert (
        other in said
        and weights_fingerprint(other) in said
        and weights_fingerprint(base) in said
        and "--base_model" in said
    )
    assert said == problems_of(model_path=other, adapter=str(run))
    assert not problems_of(model_path=other, adapter=str(run), allow_other_base=True)


def test_a_checkpoint_has_the_base_and_settings_of_its_run(trained, tiny_models, tmp_path):
    run = trained(*SPECIAL)
    checkpoint = next(run.glob("checkpoint-*"))
    other = tiny.save_tiny_model(tmp_path / "other", seed=3)
    assert "was trained on" in problems_of(model_path=str(checkpoint), base_model=other)
    parts, problems = check_trained(TrainedArgs(model_path=str(checkpoint)))
    assert problems == [] and allows_special(parts)


def test_a_missing_base_is_refused_with_the_flag_for_its_new_folder(copied):
    run = copied()
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone/base"}))
    said = problems_of(model_path=str(run))
    assert "'/gone/base'" in said and "--base_model" in said


def test_a_chain_of_adapters_is_loaded_in_order(trained, train, tiny_models, tmp_path):
    base, first = tiny_models(), trained("--learning_rate", "1e-2")
    merged = load(model_path=first).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for file in Path(first).glob("token*"):
        shutil.copy(file, tmp_path / "merged")
    second = train("--learning_rate", "1e-2", model=str(tmp_path / "merged"), output="second")
    alone = logits(load(model_path=second))
    chained = logits(load(model_path=base, adapter=f"{first},{second}"))
    torch.testing.assert_close(chained, alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(chained, logits(load(model_path=first)), atol=1e-3)


def test_a_fingerprint_depends_on_the_weights_and_not_on_their_files(tiny_models, tmp_path):
    from transformers import AutoModelForCausalLM

    base = tiny_models()
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    assert weights_fingerprint(tmp_path / "parts") == weights_fingerprint(base)
    with torch.no_grad():
        model.model.norm.weight[-1] += 1
    model.save_pretrained(tmp_path / "changed")
    assert weights_fingerprint(tmp_path / "changed") != weights_fingerprint(base)
    assert weights_fingerprint(tmp_path) is None and weights_fingerprint("nobody/nothing") is None


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-1], lambda raw: raw[:4], lambda raw: b"x" * 500, lambda raw: raw[:8] + b"{" * 900]
)
def test_a_damaged_file_is_named_before_weights_load(tiny_models, tmp_path, damage):
    shutil.copytree(tiny_models(), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    assert not check_weight_files("--model_path", tmp_path / "model")
    file.write_bytes(damage(file.read_bytes()))
    said = problems_of(model_path=str(tmp_path / "model"))
    assert str(file) in said and ("cut off" in said or "damaged" in said)
    with pytest.raises(ValueError, match="model.safetensors"):
        read_header(file)


@pytest.mark.parametrize(("values", "told"), [
    ({}, "--model_path is missing"),
    ({"model_path": "nowhere/at/all"}, "does not exist"),
    ({"model_path": "BASE", "adapter": "BASE"}, "no adapter_config.json"),
    ({"model_path": "BASE", "base_model": "BASE"}, "has full weights"),
    ({"model_path": "BASE", "template_name": "qwn"}, "Did you mean 'qwen"),
])  # fmt: skip
def test_refused_flags(tiny_models, values, told):
    base = tiny_models()
    assert told in problems_of(**{name: value.replace("BASE", base) for name, value in values.items()})


def test_a_truncated_base_stops_a_training_before_it_loads(refused, tiny_models, tmp_path):
    import tiny

    import main_train

    shutil.copytree(tiny_models(), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    rows = write_rows(tmp_path / "rows.jsonl", tiny.ROWS)
    said = refused(main_train.main, "--model_name_or_path", str(tmp_path / "model"), "--train_data_path", rows)
    assert "cut off" in said and str(file) in said


def test_an_unfinished_run_names_its_newest_complete_checkpoint(train, tmp_path):
    from utils.storage.run_folder import MANIFEST

    run = train("--save_strategy", "steps", "--save_steps", "1", "--max_steps", "3")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (run / file).unlink()
    (run / "checkpoint-3" / MANIFEST).unlink()
    said = problems_of(model_path=str(run))
    assert "has not finished" in said and said.endswith(f"checkpoint {str(run / 'checkpoint-2')!r}")
    assert not problems_of(model_path=str(run / "checkpoint-2"))


def test_an_adapter_without_generation_config_stops_at_its_tokenizers_eos(copied):
    from utils.infer.load import load_for_inference

    run = copied()
    (run / "generation_config.json").unlink()
    args = TrainedArgs(model_path=str(run))
    model, tokenizer = load_for_inference(args, check_trained(args)[0])
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id


def test_allow_special_tokens_in_content_is_read_from_the_run(trained):
    for flags, allowed in (([], False), (SPECIAL, True)):
        parts, _ = check_trained(TrainedArgs(model_path=str(trained(*flags))))
        assert allows_special(parts) is allowed
