"""Every architecture through every way of training: it learns, is saved, and is the same when loaded plainly."""

import json
from itertools import pairwise
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
import tiny
import torch
from loguru import logger
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging

from utils.args import CommonArgs
from utils.data.collate import build_collator, build_pair_collator
from utils.infer.load import Parts, TrainedArgs, load_trained
from utils.model.adapter import ADAPTERS
from utils.model.adapter_start import adapter_weights, settle_trainable
from utils.model.load import settle_attention, with_trained_adapter
from utils.model.special_tokens import impossible_tokens, untrained_tokens
from utils.runtime.errors import UserError
from utils.runtime.log import setup_logging
from utils.script import merge_lora

MODES = {
    "full": ["--train_mode", "full"],
    "lora": [],
    "dora": ["--use_dora", "true"],
    "qlora": ["--train_mode", "qlora"],
    "qdora": ["--train_mode", "qlora", "--use_dora", "true"],
    "rslora": ["--use_rslora", "true", "--learning_rate", "1e-3"],
    "pissa": ["--init_lora_weights", "pissa"],
    "rspissa": ["--init_lora_weights", "pissa", "--use_rslora", "true", "--learning_rate", "1e-3"],
}
EXTRA = {("qwen2", "rslora"), ("qwen2", "pissa"), ("qwen2", "rspissa"), ("llama", "pissa"), ("qwen2", "qdora")}
CASES = [
    (architecture, mode)
    for architecture in tiny.ARCHITECTURES
    for mode in MODES
    if mode in ("full", "lora", "dora", "qlora") or (architecture, mode) in EXTRA
]
CASES += [(name, "lora") for name in tiny.VARIANTS]
IDS = torch.arange(5, 25)[None]


def test_every_row_of_the_adapter_table_is_a_choice_and_is_tested():
    choices = get_args(get_type_hints(CommonArgs)["train_mode"])
    assert set(ADAPTERS) == set(choices)
    tested = {flags[flags.index("--train_mode") + 1] if "--train_mode" in flags else "lora" for flags in MODES.values()}
    assert set(ADAPTERS) <= tested


def logits_of(model):
    with torch.inference_mode():
        return model.eval()(IDS).logits.float()


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
def test_trains_saves_and_reloads_the_same(architecture, mode, train, tiny_models, monkeypatch):
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
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("mode", ["lora", "dora", "qlora", "pissa"])
def test_only_the_adapter_moves(mode, train, tiny_models, monkeypatch):
    """Base weights stay to the bit; every adapter weight that a gradient reaches moves."""
    import utils.run.save
    import utils.train.trainer

    before, after = {}, {}

    def snapshot(target):
        def take(trainer, *rest):
            target.update({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
            return original[target is after](trainer, *rest)

        return take

    original = (utils.train.trainer.prepare_trainer, utils.run.save.finish_run)
    monkeypatch.setattr(utils.train.trainer, "prepare_trainer", snapshot(before))
    monkeypatch.setattr(utils.run.save, "finish_run", snapshot(after))
    train("--precision", "fp32", "--learning_rate", "1e-2", *MODES[mode])
    adapter = {name for name in before if "lora_" in name or "token_adapter.trainable" in name}
    assert adapter and adapter < set(before)
    for name, start in before.items():
        same = torch.equal(start, after[name])  # 4-bit weights are bytes here
        assert same != (name in adapter), name


def test_lora_reaches_every_linear_layer_but_the_head(train, tiny_models):
    folder = train()
    weights = load_file(folder / "adapter_model.safetensors")
    adapted = {name.split(".lora_")[0].split(".")[-1] for name in weights if ".lora_" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_chosen_target_modules(train, refused, tmp_path, tiny_models, rows_file):
    folder = train("--lora_target_modules", "q_proj,v_proj")
    assert set(json.loads((folder / "adapter_config.json").read_text())["target_modules"]) == {"q_proj", "v_proj"}
    import main_train

    said = refused(
        main_train.main,
        "--model_name_or_path",
        tiny_models(),
        "--train_data_path",
        rows_file,
        "--output_dir",
        str(tmp_path / "other"),
        "--lora_target_modules",
        "q_prj",
    )
    assert "'q_prj'" in said and "q_proj" in said
    assert not (tmp_path / "other").exists()


def test_loraplus_groups_equal_peft(train, monkeypatch):
    """Learning rates by parameter: B sixteen times A's, as PEFT's own function builds them; both decay alike."""
    import utils.run.save

    kept = {}
    monkeypatch.setattr(utils.run.save, "finish_run", lambda trainer, *rest: kept.update(trainer=trainer) or {})
    train(
        "--loraplus_lr_ratio", "16", "--learning_rate", "1e-3", "--lr_scheduler_type", "constant", "--warmup_steps",
        "0", "--weight_decay", "0.125",
    )  # fmt: skip
    trainer = kept["trainer"]
    rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert decays[id(parameter)] == 0.125, name
            assert rates[id(parameter)] == pytest.approx(1.6e-2 if "lora_B" in name else 1e-3), name


def base_with_untrained(folder, tokenizer, untrained, how, tied):
    """A base whose rows are trained but for `untrained` and those that no text can have.

    Args:
        how: "zero", as weight decay leaves rows in the end, or "drift", as a softmax pushes them: all one way.
    """
    tiny.save_tiny_model(folder, "qwen2", tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(folder)
    left = [*impossible_tokens(tokenizer, len(tokenizer)), *untrained]
    with torch.no_grad():
        for layer in {model.get_input_embeddings(), model.get_output_embeddings()}:
            start = layer.weight[left].clone()
            layer.weight.mul_(10)
            layer.weight[left] = start * 1e-4 if how == "zero" else start + torch.ones(start.shape[-1])
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("tied", "precision", "how"),
    [(True, "fp32", "zero"), (True, "fp32", "drift"), (False, "fp32", "drift"), (False, "bf16", "zero")],
)
def test_untrained_special_tokens_are_found_and_trained(tied, precision, how, train, tmp_path, tokenizer):
    """Rows as training leaves those it never meets are found and move; no other row does."""
    tokens = tokenizer.convert_tokens_to_ids(tiny.CHAT_TOKENS)
    folder = base_with_untrained(tmp_path / "base", tokenizer, tokens, how, tied)
    run = train("--learning_rate", "1e-2", "--precision", precision, model=folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trained = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trained = PeftModel.from_pretrained(trained, run).merge_and_unload()
    for layer in ("get_input_embeddings", "get_output_embeddings"):
        moved = (getattr(trained, layer)().weight - getattr(base, layer)().weight).abs().sum(-1) > 0
        assert torch.nonzero(moved).flatten().tolist() == sorted(tokens), layer
    off = train("--train_special_tokens", "off", model=folder, output="off")
    assert json.loads((off / "adapter_config.json").read_text())["trainable_token_indices"] is None


@pytest.mark.parametrize(("choice", "trained"), [("auto", None), ("on", {"embed_tokens": [1, 2]})])
def test_a_model_with_trained_special_tokens_is_left_alone_unless_told(choice, trained, train, tmp_path, tokenizer):
    folder = base_with_untrained(tmp_path / "base", tokenizer, [], "drift", True)
    run = train("--train_special_tokens", choice, model=folder)
    found = json.loads((run / "adapter_config.json").read_text())["trainable_token_indices"]
    assert (found and {name: sorted(ids) for name, ids in found.items()}) == trained


def model_of_rows(tokenizer, embedding: dict, head: dict, impossible: tuple):
    """A model whose two matrices have rows of norm 5, in any directions but for the first axis, and some others.

    Args:
        embedding, head: id → the first two numbers of its row, or a factor for the row.
        impossible: in turns the first number of the rows that no text can have; their others are 0.
    """
    config = tiny.config_for("qwen2", len(tokenizer) + 3, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config)
    never = impossible_tokens(tokenizer, len(tokenizer) + 3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        layers = (model.get_input_embeddings(), model.get_output_embeddings())
        for layer, changes in zip(layers, (embedding, head), strict=True):
            rows = torch.randn(layer.weight.shape, generator=generator)
            rows[:, 0] = 0
            rows *= 5 / rows.norm(dim=-1, keepdim=True)
            for token, change in changes.items():
                rows[token] *= change if isinstance(change, float) else 0
                rows[token, :2] += torch.tensor(change) if isinstance(change, tuple) else 0
            rows[never] = 0
            rows[never, 0] = torch.tensor(impossible * len(never))[: len(never)]
            layer.weight.copy_(rows)
    return model, set(never)


def test_impossible_tokens_are_bytes_no_text_has_and_rows_beyond_the_vocabulary(tokenizer):
    names = [chr(byte) for byte in (0xC0, 0xC1, *range(0xF5, 0x100))]
    expected = [tokenizer.get_vocab()[name] for name in names]
    assert impossible_tokens(tokenizer, len(tokenizer)) == expected
    size = max(tokenizer.get_vocab().values()) + 1
    assert impossible_tokens(tokenizer, size + 3) == [*expected, size, size + 1, size + 2]
    words = tiny.sentencepiece_tokenizer()
    assert words.convert_ids_to_tokens(impossible_tokens(words, len(words)))[:3] == ["<0xC0>", "<0xC1>", "<0xF5>"]


def test_rows_of_next_to_no_norm_are_untrained_in_either_matrix(tokenizer):
    """Below a hundredth of the median's norm, far from the impossible rows as they are; a fiftieth is trained."""
    changes = {20: 0.0099, 22: 0.02}, {21: 0.0099, 23: 0.02}
    model, never = model_of_rows(tokenizer, *changes, impossible=(5.0,))
    assert untrained_tokens(model, tokenizer) - never == {20, 21}


def test_rows_as_near_to_the_impossible_ones_as_those_are_are_untrained(tokenizer):
    """These lie at 0.9 and 1.1 of one axis, as a softmax pushes them: at most 0.1 from their mean, and a tenth more."""
    rows = {30: (1.0, 0.109), 31: (1.0, 0.111), 32: (1.109, 0.0), 33: (0.889, 0.0)}
    model, never = model_of_rows(tokenizer, rows, {}, impossible=(0.9, 1.1))
    assert untrained_tokens(model, tokenizer) - never == {30, 32}


def test_rows_smaller_than_the_impossible_ones_are_trained(tokenizer):
    """These are as they began, of norm 1 in all directions: what is as near to 0 and smaller by a fifth has moved."""
    rows = {40: (0.0, 0.79), 41: (0.0, 0.81), 42: (0.0, 1.09), 43: (0.0, 1.11)}
    model, never = model_of_rows(tokenizer, {}, rows, impossible=(1.0, -1.0))
    assert untrained_tokens(model, tokenizer) - never == {41, 42}


@pytest.mark.parametrize("one_type", [False, True], ids=["float32", "the weights' type"])
def test_an_adapter_that_is_gone_on_with_begins_as_it_came(one_type, tiny_models):
    """And the copy of it that is DPO's reference: both as the files had them, not rounded on the way."""
    base = AutoModelForCausalLM.from_pretrained(tiny_models(), dtype=torch.float32)
    rows = {"embed_tokens": [5, 9]}
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, trainable_token_indices=rows)
    model = get_peft_model(base, config)
    model.add_adapter("ref", config)
    start = adapter_weights(model)
    assert len(start) == 5 and not any(".ref" in name for name in start)
    weights = dict(model.named_parameters())
    dtype = torch.bfloat16 if one_type else torch.float32
    for name in start:
        weights[name].data = weights[name].data.bfloat16()
    settle_trainable(model, one_type=one_type, start=start)
    for name, value in start.items():
        assert torch.equal(weights[name], value.to(dtype)) and weights[name].dtype == dtype, name
        assert torch.equal(weights[name.replace(".default", ".ref")], value.to(dtype)), name


@pytest.mark.parametrize("one_type", [False, True], ids=["float32", "the weights' type"])
def test_adapters_are_trained_in_float32_and_token_rows_begin_as_the_bases(one_type, tiny_models):
    """Whatever they were rounded to on the way: TRL makes QLoRA's adapters bf16, which a float32 row is not."""
    base = AutoModelForCausalLM.from_pretrained(tiny_models(), dtype=torch.float32)
    expected = logits_of(base)
    rows = {"embed_tokens": [5, 9]}
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], trainable_token_indices=rows))
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(trained) == 5  # A and B of two layers, and the rows
    for weight in trained.values():
        weight.data = weight.data.bfloat16()
    rounded = {name: weight.detach().clone() for name, weight in trained.items()}
    settle_trainable(model, one_type=one_type, start=None)
    assert {weight.dtype for weight in trained.values()} == {torch.bfloat16 if one_type else torch.float32}
    for name, weight in trained.items():
        if "trainable_tokens" in name:
            embedding = load_file(f"{tiny_models()}/model.safetensors")["model.embed_tokens.weight"][[5, 9]]
            assert torch.equal(weight, embedding.to(weight.dtype))
            assert torch.equal(weight, rounded[name]) == one_type
        else:
            assert torch.equal(weight, rounded[name].to(weight.dtype))
    if not one_type:
        assert torch.equal(logits_of(model), expected)


def test_a_head_with_trained_rows_can_be_asked_for_its_bias():
    """TRL's fused loss reads it; without it each step would go through the whole logits instead."""
    base = AutoModelForCausalLM.from_config(tiny.config_for("qwen2", 500, tie_word_embeddings=False))
    rows = {"embed_tokens": [5], "lm_head": [5]}
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], trainable_token_indices=rows))
    head = model.get_output_embeddings()
    with pytest.raises(AttributeError):
        head.bias  # noqa: B018
    settle_trainable(model, one_type=False, start=None)
    assert head.bias is None


def test_a_head_with_a_bias_has_no_trained_rows(tiny_models, rows_file, tmp_path, refused):
    """PEFT's layer for them computes W h: a model with a bias would have other logits, by more than 1 here."""
    import main_train

    base = AutoModelForCausalLM.from_pretrained(tiny_models("phi_bias"), dtype=torch.float32)
    expected = logits_of(base)
    rows = {"embed_tokens": [5], "lm_head": [5]}
    of_peft = logits_of(get_peft_model(base, LoraConfig(target_modules=["q_proj"], trainable_token_indices=rows)))
    assert (of_peft - expected).abs().max() > 1, "PEFT keeps the bias now: nothing has to be refused any more"
    flags = ["--model_name_or_path", tiny_models("phi_bias"), "--train_data_path", rows_file, "--report_to", "none"]
    out = refused(main_train.main, *flags, "--output_dir", str(tmp_path / "run"), "--train_special_tokens", "on")
    assert "the embeddings of <|im_end|>, <|im_start|> are to be trained" in out
    assert "bias that the head of PhiForCausalLM has" in out and "--train_special_tokens off" in out


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_full_training_begins_at_the_bases_own_weights(precision, train, tiny_models):
    """To the bit, in float32: loaded in the arithmetic's bf16, each would have lost 16 of its bits."""
    run = train("--train_mode", "full", "--precision", precision, "--learning_rate", "0", "--max_steps", "1")
    before, after = load_file(f"{tiny_models()}/model.safetensors"), load_file(run / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_tokenizer_of_the_run_speaks_and_stops_as_trained(train):
    folder = train()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    stops = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert stops[0] == tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id


def test_adapter_flags_reach_the_adapter(train):
    """The saved configuration is PEFT's own record of what was trained."""
    folder = train("--lora_rank", "4", "--lora_alpha", "12", "--lora_dropout", "0.25", "--use_dora", "true",
                   "--use_rslora", "true")  # fmt: skip
    saved = json.loads((folder / "adapter_config.json").read_text())
    expected = {"r": 4, "lora_alpha": 12.0, "lora_dropout": 0.25, "use_dora": True, "use_rslora": True}
    assert {name: saved[name] for name in expected} == expected


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


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_base_with_sampling_figures_and_several_stops_is_saved(mode, train, tmp_path):
    """As older Llama-2 chats have it: a temperature without do_sample, which transformers will not save."""
    base = tiny.save_tiny_model(tmp_path / "base")
    config = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": [0, 7], "pad_token_id": 0}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(config))
    folder = train("--train_mode", mode, model=base)
    saved = json.loads((folder / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [2, 0, 7]
    assert saved["temperature"] == 0.6
    assert (folder / "train_args.json").exists()


def test_full_training_keeps_float32_weights_under_bf16(train):
    weights = load_file(train("--train_mode", "full", "--precision", "bf16") / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_attention_is_the_one_asked_for(train, monkeypatch):
    import utils.run.save

    kept = {}
    monkeypatch.setattr(utils.run.save, "finish_run", lambda trainer, *rest: kept.update(trainer=trainer) or {})
    train("--attn_implementation", "eager")
    assert kept["trainer"].model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("flags", "on"),
    [([], True), (["--gradient_checkpointing", "false"], False), (["--activation_checkpointing", "false"], False)],
)
def test_large_models_are_checkpointed_unless_told_otherwise(flags, on, train, monkeypatch):
    import utils.model.options
    import utils.run.save

    kept = {}
    monkeypatch.setattr(utils.run.save, "finish_run", lambda trainer, *rest: kept.update(trainer=trainer) or {})
    train("--max_steps", "1", *flags, output="small")
    assert not kept["trainer"].model.is_activation_checkpointing
    monkeypatch.setattr(utils.model.options, "CHECKPOINTING_FROM", 1)
    train("--max_steps", "1", *flags, output="large")
    assert kept["trainer"].model.is_activation_checkpointing == kept["trainer"].args.gradient_checkpointing == on


@pytest.fixture
def loaded(tiny_models):
    return AutoModelForCausalLM.from_pretrained(tiny_models(), dtype=torch.bfloat16)


@pytest.fixture
def with_flash(monkeypatch):
    """A machine that has flash attention, as far as it is asked."""
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


def settled(model, precision="bf16", device="cuda"):
    """What `auto` makes of the attention, and what the log says of it."""
    said = []
    setup_logging()  # which also takes what transformers warns of
    sink = logger.add(said.append, format="{message}")
    settle_attention(model, precision, torch.device(device))
    logger.remove(sink)
    assert len(said) == 1
    return model.config._attn_implementation, str(said[0]).strip()


def test_auto_takes_flash_attention_where_it_is(loaded, with_flash, monkeypatch):
    def adjust(self, wanted, **_):
        logging.get_logger("transformers").warning("the weights are float32")  # no false alarm reaches the log
        return wanted

    monkeypatch.setattr(type(loaded), "_check_and_adjust_attn_implementation", adjust)
    told = logging.get_verbosity()
    assert settled(loaded) == ("flash_attention_2", "attention is flash_attention_2")
    assert logging.get_verbosity() == told


@pytest.mark.parametrize(
    ("lacking", "options", "reason"),
    [
        (None, {"device": "cpu"}, "CUDA device"),
        (("transformers.utils.is_flash_attn_2_available", lambda: False), {}, "flash-attn is not installed"),
        (None, {"precision": "fp32"}, "bf16 and fp16"),
        (("torch.cuda.get_device_capability", lambda *_: (7, 5)), {}, "older than Ampere"),
        (("transformers.Qwen2ForCausalLM._supports_flash_attn", False), {}, "Qwen2ForCausalLM does not support"),
        (("transformers.Qwen2ForCausalLM._compatible_flash_implementations", ["a/kernel"]), {}, "does not support"),
        (("transformers.Qwen2ForCausalLM._can_set_attn_implementation", lambda *_: False), {}, "does not support"),
        # the package itself is not here, so transformers raises: auto goes on all the same
        (None, {}, "ImportError"),
    ],
)
def test_auto_says_why_there_is_no_flash_attention(lacking, options, reason, loaded, with_flash, monkeypatch):
    if lacking:
        monkeypatch.setattr(*lacking, raising=False)
    found, said = settled(loaded, **options)
    assert found == "sdpa" and said.startswith("attention is sdpa (no flash attention: ") and reason in said
    loaded(IDS)


def test_heads_too_large_for_flash_attention(tiny_models, with_flash):
    model = AutoModelForCausalLM.from_pretrained(tiny_models("llama", head_dim=320))
    assert settled(model) == (
        "sdpa",
        "attention is sdpa (no flash attention: its heads have 320 dimensions, more than 256)",
    )


def plain_varlen(query, key, value, cu_seqlens_q, cu_seqlens_k, softmax_scale=None, **_):
    """flash_attn_varlen_func written out: each row by itself; [tokens, heads, size] each."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    rows = []
    for start, end in pairwise(cu_seqlens_q.tolist()):
        states = [part[start:end].transpose(0, 1) for part in (query, key, value)]
        options = {"is_causal": True, "scale": softmax_scale, "enable_gqa": True}
        rows.append(torch.nn.functional.scaled_dot_product_attention(*states, **options).transpose(0, 1))
    return torch.cat(rows)


@pytest.mark.parametrize("collator", ["sft", "pairs"])
def test_flash_attention_gets_rows_end_to_end_one_at_a_time(collator, tiny_models, monkeypatch):
    """What either collator makes goes to the variable-length kernel, and each row is as if it were alone."""
    import transformers.modeling_flash_attention_utils as of_flash

    def no_kernel(*_, **__):
        raise AssertionError("the rows were taken for one")

    def scale_alone(softmax_scale=None, **_):
        return {"softmax_scale": softmax_scale}

    functions = ((no_kernel, plain_varlen, None, None, None), (scale_alone, None))
    monkeypatch.setattr(of_flash, "lazy_import_flash_attention", lambda *_: functions)
    model = AutoModelForCausalLM.from_pretrained(tiny_models(), dtype=torch.float32).eval()
    rows = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    if collator == "sft":
        batch = build_collator(0, padding_free=True)([{"input_ids": row, "labels": row} for row in rows])
    else:
        pair = {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]}
        batch = build_pair_collator(0, padding_free=True)([{**pair, "chosen_labels": [7], "rejected_labels": [8, 9]}])
        rows = [[5, 6, 7], [5, 6, 8, 9]]
    batch = {name: value for name, value in batch.items() if name not in ("labels", "source", "row")}
    with torch.inference_mode():
        alone = torch.cat([model(torch.tensor([row])).logits[0] for row in rows])
        model.config._attn_implementation_internal = "flash_attention_2"
        together = model(**batch, use_cache=False).logits[0]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("task", ["sft", "dpo_single"])
def test_pissa_in_bf16_is_saved_as_it_was_trained(task, train, tiny_models, tmp_path, monkeypatch):
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


@pytest.mark.parametrize("use", ["load", "merge", "train"])
def test_a_pissa_checkpoint_in_bf16_is_the_model_that_was_trained(use, train, tiny_models, tmp_path):
    """Its adapter on the base as loaded in bf16 gives the logits of the finished run, whose last step it is."""
    base = tiny.save_tiny_model(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    flags = ["--init_lora_weights", "pissa", "--precision", "bf16", "--learning_rate", "1e-3", "--max_steps", "2"]
    folder = train(*flags, "--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "2", model=base)
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
    (folder / "checkpoint-2" / "pissa_start.safetensors").unlink()
    with pytest.raises(UserError, match="PiSSA run without pissa_start"):
        load_trained(TrainedArgs(), Parts(base, (checkpoint,)))
