"""Merging: the same logits as with the adapter, a folder that every loader takes, and what is refused."""

import hashlib
import importlib.machinery
import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import tiny
import torch
from conftest import write_rows
from modes import MODES, base_with_untrained
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import main_train
from utils.export import merge as merging
from utils.export.merge_folder import atomic_folder, foreign_to_merge
from utils.infer.load import check_trained
from utils.runtime.errors import UserError
from utils.script import merge_lora
from utils.storage.weights import weights_fingerprint

IDS = torch.arange(5, 25)[None]
KINDS = [kind for kind in MODES if kind != "full"]
CASES = [("qwen2", kind, {}) for kind in KINDS]
CASES += [(name, kind, {}) for name in tiny.ARCHITECTURES[1:] for kind in ("lora", "dora", "rslora", "pissa", "qlora")]
CASES += [("qwen2", "lora", {"tie_word_embeddings": True})]


def logits(model):
    with torch.inference_mode():
        return model.eval().float()(IDS).logits


def load(folder, *adapters, dtype=torch.float32):
    """As a user without this project loads a model, or a base with adapters on it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    for number, adapter in enumerate(adapters, 1):
        model = PeftModel.from_pretrained(model, adapter)
        model = model if number == len(adapters) else model.merge_and_unload()
    return model


def merged(folder, *flags, output="merged"):
    output = folder.parent / output
    merge_lora.main(["--model_path", str(folder), "--output_dir", str(output), *flags])
    return output


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with an adapter that moved its base, `folder/run` on `folder/base`; read, never written."""
    folder = tmp_path_factory.mktemp("merge")
    flags = ["--model_name_or_path", tiny.save_tiny_model(folder / "base"), "--output_dir", str(folder / "run")]
    rows = write_rows(folder / "rows.jsonl", tiny.ROWS)
    main_train.main([
        *flags, "--train_data_path", rows, "--learning_rate", "1e-2", "--num_train_epochs", "4", "--precision", "fp32",
        "--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "true", "--template_name", "qwen2.5",
    ])  # fmt: skip
    return folder / "run"


@pytest.fixture
def copied(run, tmp_path):
    """A copy of that run with its base, to be changed; returns the run's folder."""
    shutil.copytree(run.parent, tmp_path / "copy")
    config = json.loads((run / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "copy" / "base")
    (tmp_path / "copy" / "run" / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path / "copy" / "run"


def listing(folder):
    """Every file below a folder, with its content's hash."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ------------------------------------------------------------------------------ the same logits


@pytest.mark.parametrize(("architecture", "kind", "changes"), CASES)
def test_merged_logits_are_the_adapters(architecture, kind, changes, train, tiny_models):
    """In float32, to 1e-5; a QLoRA adapter is merged into the base that is not quantised."""
    base = tiny_models(architecture, **changes)
    folder = train("--precision", "fp32", "--learning_rate", "1e-2", *MODES[kind], model=base)
    whole = merged(folder)
    wanted = logits(load(base, folder))
    torch.testing.assert_close(logits(load(whole)), wanted, rtol=1e-5, atol=1e-5)
    assert (wanted - logits(load(base))).abs().max() > 1e-2
    config = json.loads((whole / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    of_base = json.loads((Path(base) / "config.json").read_text())
    assert config["tie_word_embeddings"] == of_base["tie_word_embeddings"]
    assert not (whole / "adapter_config.json").exists()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["lora", "dora", "qlora"])
def test_trained_token_rows_are_merged(tied, kind, train, tmp_path, tokenizer):
    tokens = tokenizer.convert_tokens_to_ids(tiny.CHAT_TOKENS)
    base = base_with_untrained(tmp_path / "base", tokenizer, tokens, "drift", tied)
    folder = train("--precision", "fp32", "--learning_rate", "1e-2", *MODES[kind], model=base)
    whole = load(merged(folder))
    torch.testing.assert_close(logits(whole), logits(load(base, folder)), rtol=1e-5, atol=1e-5)
    for layer in ("get_input_embeddings", "get_output_embeddings"):
        moved = (getattr(whole, layer)().weight - getattr(load(base), layer)().weight).abs().sum(-1) > 0
        assert torch.nonzero(moved).flatten().tolist() == sorted(tokens), layer
    assert (whole.get_input_embeddings().weight is whole.get_output_embeddings().weight) == tied


def test_sft_then_dpo_then_merged(train, tiny_models, tmp_path):
    """DPO goes on with the SFT run's adapter, so that its own on the base is the whole of it."""
    base, first = tiny_models(), train("--learning_rate", "1e-2", "--precision", "fp32", output="sft")
    pairs = write_rows(tmp_path / "pairs.jsonl", tiny.PAIRS)
    second = train(
        "--train_args_path", "train_args/dpo/base.py", "--adapter_name_or_path", str(first), "--precision", "fp32",
        "--learning_rate", "1e-2", model=base, data=pairs, output="dpo",
    )  # fmt: skip
    whole = logits(load(merged(second)))
    torch.testing.assert_close(whole, logits(load(base, second)), rtol=1e-5, atol=1e-5)
    assert (whole - logits(load(merged(first, output="first")))).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_chain_of_adapters_each_on_the_merged_ones_before(kind, run, train):
    base, middle = run.parent / "base", merged(run, output=f"middle-{kind}")
    flags = ["--learning_rate", "1e-2", "--precision", "fp32", "--template_name", "qwen2.5", *MODES[kind]]
    second = train(*flags, model=str(middle))
    wanted = logits(load(middle, second))
    torch.testing.assert_close(wanted, logits(load(base, run, second)), rtol=1e-5, atol=1e-5)
    by_base = merged(base, "--adapter", f"{run},{second}", output=f"by-base-{kind}")
    by_middle = merged(second)
    for whole in (by_base, by_middle):
        torch.testing.assert_close(logits(load(whole)), wanted, rtol=1e-5, atol=1e-5)
    origin = json.loads((by_base / "merged.json").read_text())
    assert [adapter["path"] for adapter in origin["adapters"]] == [str(run), str(second)]
    # an adapter whose recorded base is an adapter itself
    config = json.loads((second / "adapter_config.json").read_text())
    (second / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(run)}))
    assert weights_fingerprint(merged(second, output="by-adapter")) == weights_fingerprint(by_base)


def test_a_bf16_base_is_merged_in_float32_and_rounded_once(tmp_path, monkeypatch):
    """Nearer to the exact weights than PEFT's safe merge in bf16, which rounds twice; what rounding costs is said."""
    base = tiny.save_tiny_model(tmp_path / "base", hidden_size=128, intermediate_size=256)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    model = get_peft_model(load(base), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    said = []
    monkeypatch.setattr(merge_lora.logger, "info", lambda text, *more: said.append(text.format(*more)))
    whole = merged(tmp_path / "adapter")
    exact = dict(load(base, tmp_path / "adapter").merge_and_unload().named_parameters())
    rough = load(base, tmp_path / "adapter", dtype=torch.bfloat16).merge_and_unload(safe_merge=True)
    saved = load_file(whole / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.bfloat16}
    for name, weight in saved.items():
        assert torch.equal(weight, exact[name].bfloat16()), name

    def distance(weights):
        return sum((weight.float() - exact[name]).square().sum() for name, weight in weights)

    layers = [name for name in exact if "proj" in name]
    assert distance((name, saved[name]) for name in layers) < 0.9 * distance(
        (name, weight) for name, weight in rough.named_parameters() if name in layers
    )
    before = dict(load(base).named_parameters())
    lost = sum((saved[name].float() - exact[name]).square().sum() for name in layers)
    share = (lost / sum((exact[name] - before[name]).square().sum() for name in layers)) ** 0.5
    (told,) = (text for text in said if "rounding" in text)
    assert f"rounding to bfloat16 moved the merged weights by {100 * share:.2g} % of what training" in told
    said.clear()
    kept = merged(tmp_path / "adapter", "--dtype", "float32", output="float32")
    torch.testing.assert_close(logits(load(kept)), logits(load(base, tmp_path / "adapter")), rtol=1e-5, atol=1e-5)
    assert not any("rounding" in text for text in said)


def test_a_chain_on_a_bf16_base_is_rounded_once_at_its_end(tmp_path):
    """W + s B₁A₁ + s B₂A₂ in float32, by hand: not rounded after the first adapter as well."""
    base = tiny.save_tiny_model(tmp_path / "base", hidden_size=128, intermediate_size=256)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    torch.manual_seed(0)
    for name in ("first", "second"):
        model = get_peft_model(load(base), LoraConfig(r=4, lora_alpha=8, target_modules=["up_proj"]))
        for weight in (weight for part, weight in model.named_parameters() if "lora_B" in part):
            torch.nn.init.normal_(weight, std=0.1)
        model.save_pretrained(tmp_path / name)
    merge_lora.main(["--model_path", base, "--adapter", f"{tmp_path}/first,{tmp_path}/second", "--output_dir",
                     str(tmp_path / "whole")])  # fmt: skip
    saved, before = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "base"))
    adapters = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second")]
    for layer in ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"):
        exact = before[f"{layer}.weight"].float()
        for adapter in adapters:
            a, b = (adapter[f"base_model.model.{layer}.lora_{part}.weight"] for part in "AB")
            exact = exact + 2.0 * b @ a
        wrong = saved[f"{layer}.weight"] != exact.bfloat16()
        assert wrong.float().mean() < 1e-3  # a sum in another order may fall on the other side of a half


# ------------------------------------------------------------------------------ what is left


def test_the_folder(run, tmp_path):
    """Its exact files, in shards, with what it was merged of; base and run stay as they were."""
    before = listing(run.parent / "base"), listing(run)
    (run.parent / "base" / "tokenizer.model").write_bytes(b"SentencePiece")  # as bases for the converters have it
    try:
        whole = tmp_path / "whole"
        flags = ["--max_shard_size", "50KB", "--modelfile", "true"]
        merge_lora.main(["--model_path", str(run), "--output_dir", str(whole), *flags])
    finally:
        (run.parent / "base" / "tokenizer.model").unlink()
    assert (listing(run.parent / "base"), listing(run)) == before
    shards = {path.name for path in whole.glob("model-*.safetensors")}
    assert len(shards) > 3 and sum(path.stat().st_size > 60_000 for path in whole.glob("model-*")) <= 2
    assert {path.name for path in whole.iterdir()} - shards == {
        "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja", "tokenizer.model", "train_args.json", "merged.json",
        "Modelfile",
    }  # fmt: skip
    assert not [path for path in tmp_path.iterdir() if path != whole]
    index = json.loads((whole / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index.values()) == shards
    origin = json.loads((whole / "merged.json").read_text())
    assert origin["base"] == {"path": str(run.parent / "base"), "fingerprint": weights_fingerprint(run.parent / "base")}
    sha256 = hashlib.sha256((run / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert origin["adapters"] == [{"path": str(run), "sha256": sha256}]
    assert origin["dtype"] == "float32" and origin["fingerprint"] == weights_fingerprint(whole)
    for name in ("chat_template.jinja", "tokenizer.json"):
        assert (whole / name).read_bytes() == (run / name).read_bytes(), name
    stops = [json.loads((folder / "generation_config.json").read_text())["eos_token_id"] for folder in (whole, run)]
    assert stops[0] == stops[1] == [2, 0]
    text = (whole / "Modelfile").read_text(encoding="utf-8")
    assert 'PARAMETER stop "<|im_end|>"\nPARAMETER stop "<|endoftext|>"\n' in text
    assert 'SYSTEM """You are Qwen' in text  # the run's format, not the default one


def test_the_folder_is_talked_to_and_trained_on(run, train, tmp_path, capsys):
    from utils.script import infer

    whole = tmp_path / "whole"
    merge_lora.main(["--model_path", str(run), "--output_dir", str(whole)])
    flags = ["--prompt", "Hi", "--max_new_tokens", "8"]
    said = []
    for folder in (run, whole):
        capsys.readouterr()
        infer.main(["--model_path", str(folder), *flags])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and said[0].strip()
    again = train(model=str(whole))
    assert json.loads((again / "train_args.json").read_text())["common"]["template_name"] == "qwen2.5"
    parts, problems = check_trained(merge_lora.MergeArgs(model_path=str(again)))
    assert not problems and parts.base == str(whole)


def test_an_adapter_from_elsewhere_and_a_checkpoint(copied):
    """Without a run's notes: the base's tokenizer and stops, the format of what is saved, or the one that is named."""
    for name in ("train_args.json", "generation_config.json"):
        (copied / name).unlink()
    whole = merged(copied, output="no-notes")
    assert json.loads((whole / "train_args.json").read_text()) == {"common": {"template_name": "qwen2.5"}}
    for path in [*copied.glob("token*"), copied / "chat_template.jinja"]:
        path.unlink()
    bare = merged(copied, output="bare")
    assert AutoTokenizer.from_pretrained(bare).chat_template is None
    named = merged(copied, "--template_name", "yi", "--modelfile", "true", output="named")
    assert AutoTokenizer.from_pretrained(named).eos_token == "<|im_end|>"
    assert json.loads((named / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
    assert json.loads((named / "train_args.json").read_text())["common"]["template_name"] == "yi"
    assert "SYSTEM" not in (named / "Modelfile").read_text()


def test_a_modelfile_alone(run, tmp_path, refused, monkeypatch):
    """For whole weights: written into their folder, with what the converters are told of the BOS, and nothing else."""
    whole = tmp_path / "whole"
    merge_lora.main(["--model_path", str(run), "--output_dir", str(whole)])
    before = listing(whole)
    merge_lora.main(["--model_path", str(whole), "--modelfile", "true"])
    after = listing(whole)
    changed = {"Modelfile", "tokenizer_config.json", "merged.json"}  # the last lists the files of a merge
    assert {name for name in after if after[name] != before.get(name)} == changed
    assert foreign_to_merge(whole) == []
    assert "Modelfile already" in refused(merge_lora.main, "--model_path", str(whole), "--modelfile", "true")
    (whole / "checkpoint-1").mkdir()
    shutil.copy(whole / "model.safetensors", whole / "checkpoint-1")
    said = []
    monkeypatch.setattr(merge_lora.logger, "warning", lambda text, *more: said.append(text.format(*more)))
    merge_lora.main(["--model_path", str(whole), "--modelfile", "true", "--overwrite", "true"])
    assert "checkpoints" in said[0]
    assert listing(whole)["Modelfile"] == after["Modelfile"]


# ------------------------------------------------------------------------------ what is refused


def test_a_full_run_and_a_format_without_a_form_in_go(refused, copied):
    said = refused(merge_lora.main, "--model_path", str(copied.parent / "base"))
    assert "nothing to merge" in said and "--modelfile true" in said
    whole = ["--model_path", str(copied.parent / "base"), "--modelfile", "true"]
    assert "is not saved with it" in refused(merge_lora.main, *whole)
    assert "--output_dir" in refused(merge_lora.main, *whole, "--output_dir", "x")
    (copied / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}!{% endfor %}")
    out = copied.parent / "merged"
    flags = ["--model_path", str(copied), "--output_dir", str(out), "--modelfile", "true"]
    said = refused(merge_lora.main, *flags)
    assert "cannot be written in Go's syntax" in said and "--template_name" in said and "convert_hf_to_gguf.py" in said
    assert not out.exists()
    merge_lora.main(flags[:4])
    assert "!" in AutoTokenizer.from_pretrained(out).chat_template


@pytest.mark.parametrize(("flags", "told"), [
    ([], ["--model_path is missing"]),
    (["--model_path", "nowhere/at/all", "--max_shard_size", "5 gigs"], ["does not exist", "'5 gigs'", "5GB"]),
    (["--model_path", "EMPTY"], ["no config.json"]),
    (["--model_path", "RUN"], ["--output_dir is missing"]),
    (["--model_path", "RUN", "--output_dir", "RUN"], ["is or contains", "another folder"]),
    (["--model_path", "RUN", "--output_dir", "BASE"], ["is or contains"]),
    (["--model_path", "RUN", "--output_dir", "RUN/.."], ["is or contains"]),
    (["--model_path", "RUN", "--output_dir", "RUN/train.log"], ["is a file"]),
    (["--model_path", "RUN", "--output_dir", "FULL", "--overwrite", "true"], ["'notes.txt'", "no merge wrote"]),
    (["--model_path", "RUN", "--output_dir", "x", "--dtype", "float8"], ["'float8'", "bfloat16"]),
    (["--model_path", "RUN", "--output_dir", "x", "--outputdir", "y"], ["Did you mean '--output_dir'"]),
])  # fmt: skip
def test_what_is_refused(flags, told, refused, run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    names = {"RUN": run, "BASE": run.parent / "base", "EMPTY": tmp_path / "empty", "FULL": tmp_path / "full"}
    for name, path in names.items():
        flags = [flag.replace(name, str(path)) for flag in flags]
    said = refused(merge_lora.main, *flags)
    assert all(text in said for text in told)
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


def cut_off(run):
    file = run / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])


def not_finite(run):
    weights = load_file(run / "adapter_model.safetensors")
    weights[next(name for name in weights if "lora_B" in name)][0, 0] = float("nan")
    save_file(weights, run / "adapter_model.safetensors", metadata={"format": "pt"})


def other_base(run):
    file = run.parent / "base" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] += 1
    save_file(weights, file, metadata={"format": "pt"})


def without_a_weight(run):
    file = run.parent / "base" / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    (run / "train_args.json").unlink()  # which knows the base's fingerprint


def base_gone(run):
    (run.parent / "base").rename(run.parent / "elsewhere")


def quantised(run):
    file = run.parent / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))


def of_another_kind(run):
    file = run / "adapter_config.json"
    values = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 2}
    base = json.loads(file.read_text())["base_model_name_or_path"]
    file.write_text(json.dumps(values | {"base_model_name_or_path": base}))
    save_file({"prompt_embeddings": torch.zeros(2, 64)}, run / "adapter_model.safetensors")


@pytest.mark.parametrize(("damage", "told"), [
    (cut_off, ["adapter_model.safetensors is cut off", "copy or download it again"]),
    (not_finite, ["cannot be merged", "NaN", "checkpoint from before"]),
    (other_base, ["was trained on", "--base_model", "--allow_other_base"]),
    (without_a_weight, ["lacks weights", "up_proj"]),
    (base_gone, ["does not exist", "--base_model"]),
    (quantised, ["quantised (gptq)", "--base_model"]),
    (of_another_kind, ["PROMPT_TUNING", "cannot be merged"]),
])  # fmt: skip
def test_what_cannot_be_merged(damage, told, refused, copied, tmp_path):
    damage(copied)
    said = refused(merge_lora.main, "--model_path", str(copied), "--output_dir", str(tmp_path / "merged"))
    assert all(text in said for text in told), said
    assert not [path.name for path in tmp_path.iterdir() if "merged" in path.name]


def test_a_base_that_was_moved_and_another_one_by_name(copied, tmp_path):
    wanted = logits(load(copied.parent / "base", copied))
    base_gone(copied)
    elsewhere = copied.parent / "elsewhere"
    whole = merged(copied, "--base_model", str(elsewhere))
    torch.testing.assert_close(logits(load(whole)), wanted, rtol=1e-5, atol=1e-5)
    elsewhere.rename(copied.parent / "base")
    other_base(copied)
    other = merged(copied, "--allow_other_base", "true", output="other")
    assert (logits(load(other)) - wanted).abs().max() > 1e-2


def test_weights_too_large_for_fp16_are_refused(refused, copied, tmp_path):
    weights = load_file(copied / "adapter_model.safetensors")
    for name, weight in weights.items():
        weight.zero_()
        if "layers.1.self_attn.v_proj.lora" in name:
            weight[0, 0] = 400  # one weight of 160,000 or more
    save_file(weights, copied / "adapter_model.safetensors", metadata={"format": "pt"})
    flags = ["--model_path", str(copied), "--output_dir", str(tmp_path / "merged")]
    assert "bfloat16" in refused(merge_lora.main, *flags, "--dtype", "float16")
    merge_lora.main([*flags, "--dtype", "bfloat16"])
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"


# ------------------------------------------------------------------------------ whole or not at all


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_disk_too_small_is_told_before(dtype, refused, run, tmp_path, monkeypatch):
    size = sum(path.stat().st_size for path in (run.parent / "base").glob("*.safetensors")) / (2 if dtype else 1)
    flags = ["--model_path", str(run), "--output_dir", str(tmp_path / "merged"), *(["--dtype", dtype] if dtype else [])]
    monkeypatch.setattr(merging, "load_merged", lambda *_: pytest.fail("loaded"))
    room = {"free": 0.9 * size}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), room))
    said = refused(merge_lora.main, *flags)
    assert "GB free" in said and "free some space" in said
    room["free"] = 1.1 * size
    merge_lora.parse(flags)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("bug")])
def test_what_fails_leaves_nothing_and_what_was_there(error, refused, run, tmp_path, monkeypatch):
    flags = ["--model_path", str(run), "--output_dir", str(tmp_path / "merged")]
    merge_lora.main(flags)
    assert "--overwrite true" in refused(merge_lora.main, *flags)
    before = listing(tmp_path)
    fails = lambda *_: (_ for _ in ()).throw(error)  # noqa: E731
    for name in ("_write_merge_record", "_write_settings"):
        with monkeypatch.context() as patched:
            patched.setattr(merging, name, fails)
            if isinstance(error, OSError):
                assert "No space left" in refused(merge_lora.main, *flags, "--overwrite", "true")
            else:
                with pytest.raises(type(error)):
                    merge_lora.main([*flags, "--overwrite", "true"])
        assert listing(tmp_path) == before and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "merged" / "model.gguf").write_text("mine")
    said = refused(merge_lora.main, *flags, "--overwrite", "true")
    assert "holds 'model.gguf', which no merge wrote" in said and "move it" in said
    (tmp_path / "merged" / "model.gguf").unlink()
    merge_lora.main([*flags, "--overwrite", "true"])
    assert listing(tmp_path).keys() == before.keys() and len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_merge_left_is_cleared_and_put_back(tmp_path):
    """Killed while writing, or between the two renames."""
    folder, part, old = tmp_path / "merged", tmp_path / ".merged.part", tmp_path / ".merged.old"
    part.mkdir()
    (part / ".merging").touch()
    (part / "torso").write_text("half")
    old.mkdir()
    (old / "earlier").write_text("whole")
    (old / "merged.json").write_text('{"files": {"earlier": 5}}')
    with pytest.raises(RuntimeError), atomic_folder(folder, "--output_dir x") as written:
        assert not (written / "torso").exists() and (folder / "earlier").read_text() == "whole"
        raise RuntimeError
    assert listing(tmp_path).keys() == {"merged/earlier", "merged/merged.json"}
    with atomic_folder(folder, "--output_dir x") as written:
        (written / "new").write_text("whole")
    assert listing(tmp_path).keys() == {"merged/new"}


@pytest.mark.parametrize("change", ["added", "changed", "link", "while merging"])
def test_a_merged_folder_that_was_changed_is_not_replaced(tmp_path, change):
    folder = tmp_path / "merged"
    folder.mkdir()
    (folder / "model.safetensors").write_text("whole")
    (folder / "merged.json").write_text('{"files": {"model.safetensors": 5}}')
    if change == "changed":
        (folder / "model.safetensors").write_text("another")
    elif change == "link":
        (tmp_path / "elsewhere").write_text("whole")
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    elif change == "added":
        (folder / "sub").mkdir()
        (folder / "sub" / "model.gguf").write_text("mine")
    with (
        pytest.raises(UserError, match="which no merge wrote"),
        atomic_folder(folder, "--output_dir x") as written,
    ):
        (written / "new").write_text("whole")
        if change == "while merging":
            (folder / "notes.txt").write_text("mine")
    assert "new" not in {path.name for path in tmp_path.rglob("*")}
    assert (folder / "merged.json").exists() and not (tmp_path / ".merged.part").exists()


def test_a_folder_of_ones_own_by_the_name_a_merge_uses_is_left_alone(tmp_path):
    for name in (".merged.part", ".merged.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("x")
    (tmp_path / "merged").mkdir()
    with pytest.raises(UserError, match="cannot be written"), atomic_folder(tmp_path / "merged", "--output_dir x"):
        pass
    assert listing(tmp_path).keys() == {".merged.part/mine", ".merged.old/mine"}


def test_merging_leaves_deepspeed_out(train, tmp_path, monkeypatch):
    """What is merged is saved, for which accelerate would import it: seconds, and a warning of its own."""
    import accelerate.utils.imports
    import accelerate.utils.other

    folder, asked = train(), []

    class Watched(types.ModuleType):
        def __getattr__(self, name):
            if name == "DeepSpeedEngine":
                asked.append(name)
                return type(name, (), {})
            raise AttributeError(name)

    module = Watched("deepspeed")
    module.__spec__ = importlib.machinery.ModuleSpec("deepspeed", None)
    monkeypatch.setitem(sys.modules, "deepspeed", module)
    # as in a process that has not trained
    found = accelerate.utils.imports.is_deepspeed_available
    monkeypatch.setattr(accelerate.utils.other, "is_deepspeed_available", found)
    merge_lora.main(["--model_path", str(folder), "--output_dir", str(tmp_path / "merged")])
    assert (tmp_path / "merged" / "model.safetensors").is_file() and not asked
