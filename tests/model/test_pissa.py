"""PiSSA: saved as plain LoRA of twice the rank, from a run and from a checkpoint."""

import json
import shutil
from types import SimpleNamespace

import pytest
import tiny
import torch
from conftest import train_tiny, write_rows
from modes import logits_of
from peft import PeftModel
from transformers import AutoModelForCausalLM

from utils.infer.load import Parts, TrainedArgs, load_trained
from utils.model.load import with_trained_adapter
from utils.runtime.errors import UserError
from utils.script import merge_lora


@pytest.mark.parametrize("more", [[], ["--use_rslora", "true"]])
def test_pissa_is_saved_as_plain_lora_of_twice_the_rank(more, train, tiny_models):
    """Loaded on the unchanged base it moves the weights by B A - B0 A0, which is small; PiSSA's B A is not."""
    folder = train("--init_lora_weights", "pissa", "--lora_rank", "4", "--precision", "fp32", *more)
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert (saved["r"], saved["init_lora_weights"]) == (8, True)
    base = AutoModelForCausalLM.from_pretrained(tiny_models(), dtype=torch.float32)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_models(), dtype=torch.float32), folder)
    weight = base.model.layers[0].mlp.up_proj.weight
    moved = tuned.merge_and_unload().model.layers[0].mlp.up_proj.weight - weight
    assert 0 < moved.norm() < 0.2 * weight.norm()
    assert not (folder / "pissa_start").exists()


@pytest.mark.parametrize("task", ["sft", "dpo_single"])
def test_pissa_saved_in_bf16_has_the_logits_of_training(task, train, tiny_models, tmp_path, monkeypatch):
    """The residual of the weights is not rounded: in float32, base and saved adapter are the model that was trained."""
    import utils.run.save

    kept = {}
    finish = utils.run.save.finish_run

    def finish_and_keep(trainer, *rest):
        kept["trainer"] = trainer
        return finish(trainer, *rest)

    monkeypatch.setattr(utils.run.save, "finish_run", finish_and_keep)
    kind = task.split("_")[0]
    rows = {"sft": tiny.ROWS, "dpo": tiny.PAIRS}[kind]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    flags = ["--train_args_path", f"train_args/{kind}/base.py", "--task_type", task, "--init_lora_weights", "pissa"]
    folder = train(*flags, "--precision", "bf16", "--learning_rate", "1e-3", data=str(data))
    trainer = kept["trainer"]
    # without the autocast that training leaves around it
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).float().eval()
    half = AutoModelForCausalLM.from_pretrained(tiny_models(), dtype=torch.bfloat16).float()
    base = logits_of(half)
    again = PeftModel.from_pretrained(half, folder)
    lost = (logits_of(again) - logits_of(model)).norm() / (logits_of(model) - base).norm()
    assert lost < 1e-4  # of what training changed; with residuals rounded to bf16 it is some per cent
    layers = {name: layer for name, layer in again.named_modules() if name.endswith("up_proj")}
    for name, layer in layers.items():
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            moved, difference = layer(x) - layer.base_layer(x), layer(x) - model.get_submodule(name)(x)
        assert difference.norm() < 1e-4 * moved.norm(), name


@pytest.fixture(scope="module")
def checkpointed(tmp_path_factory):
    """A base in bf16, and a PiSSA run on it with a checkpoint of each step; only read."""
    folder = tmp_path_factory.mktemp("pissa")
    base = tiny.save_tiny_model(folder / "base")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    flags = ["--init_lora_weights", "pissa", "--precision", "bf16", "--learning_rate", "1e-3", "--max_steps", "2"]
    flags += ["--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "2"]
    return base, train_tiny(folder / "run", base, write_rows(folder / "rows.jsonl", tiny.ROWS), *flags)


@pytest.mark.parametrize("use", ["load", "merge", "train"])
def test_a_pissa_checkpoint_in_bf16_has_the_logits_of_the_run(use, checkpointed, tmp_path):
    """Its adapter on the base as loaded in bf16 gives the logits of the finished run, whose last step it is."""
    base, folder = checkpointed
    wanted = logits_of(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base).float(), folder))
    moved = (wanted - logits_of(AutoModelForCausalLM.from_pretrained(base).float())).norm()
    checkpoint = str(folder / "checkpoint-2")
    if use == "load":
        found = load_trained(TrainedArgs(), Parts(base, (checkpoint,))).float()
    elif use == "merge":
        whole = str(tmp_path / "merged")
        merge_lora.main(["--model_path", checkpoint, "--output_dir", whole, "--dtype", "float32"])
        found = AutoModelForCausalLM.from_pretrained(whole)
    else:
        args = SimpleNamespace(adapter_name_or_path=checkpoint, train_mode="lora", model_name_or_path=base)
        found = with_trained_adapter(AutoModelForCausalLM.from_pretrained(base), args).float()
    assert (logits_of(found.eval()) - wanted).norm() < 1e-3 * moved


def test_a_pissa_checkpoint_without_its_start_is_refused(checkpointed, tmp_path):
    base, folder = checkpointed
    checkpoint = shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    (checkpoint / "pissa_start.safetensors").unlink()
    with pytest.raises(UserError, match="PiSSA run without pissa_start"):
        load_trained(TrainedArgs(), Parts(base, (str(checkpoint),)))
