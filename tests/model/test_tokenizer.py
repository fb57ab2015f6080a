"""Loading a tokenizer: one that fits the model, can pad, and stops where the chat format says."""

import copy
import json
from types import SimpleNamespace

import pytest
import tiny

from utils.model.tokenizer import apply_chat_format, load_run_tokenizer, load_tokenizer, save_chat_format, stop_at_eos
from utils.runtime.errors import UserError
from utils.template import get_template


@pytest.fixture
def saved(tmp_path):
    """Saves a tokenizer with changed attributes beside a model's configuration; returns the folder."""

    def save(vocab_size=600, **changes):
        tokenizer = copy.deepcopy(tiny.byte_level_tokenizer())
        for name, value in changes.items():
            setattr(tokenizer, name, value)
        tokenizer.save_pretrained(tmp_path)
        tiny.config_for("qwen2", vocab_size).save_pretrained(tmp_path)
        return str(tmp_path)

    return save


@pytest.mark.parametrize(
    ("more", "pad"), [([], "<|endoftext|>"), (["<unk>"], "<|endoftext|>"), (["[PAD]", "<unk>"], "[PAD]"),
                      (["[PAD]", "<|finetune_right_pad_id|>"], "<|finetune_right_pad_id|>")],
)  # fmt: skip
def test_a_tokenizer_without_a_pad_token_gets_a_reserved_one(more, pad, tmp_path):
    tokenizer = copy.deepcopy(tiny.byte_level_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": more})
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    tiny.config_for("qwen2", 600).save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token == pad


def test_a_pad_token_of_its_own_is_kept(saved):
    assert load_tokenizer(saved(pad_token="<|im_start|>")).pad_token == "<|im_start|>"


def test_what_is_no_tokenizer_is_refused_by_its_flag(tmp_path):
    with pytest.raises(UserError, match="--model_path"):
        load_tokenizer(str(tmp_path / "nowhere"), flag="--model_path")


def test_a_tokenizer_of_another_model_is_refused(saved):
    largest = max(tiny.byte_level_tokenizer().get_vocab().values())
    with pytest.raises(UserError, match=f"has ids up to {largest}, and the model's embedding {largest} rows"):
        load_tokenizer(saved(vocab_size=largest))
    assert len(load_tokenizer(saved(vocab_size=largest + 1))) == largest + 1


def test_auto_takes_the_chat_templates_saved_with_the_adapter(saved, tmp_path):
    args = SimpleNamespace(model_name_or_path=saved(chat_template="of the base"), trust_remote_code=False,
                           add_tokens=None,
                           adapter_name_or_path=str(tmp_path / "adapter"), template_name="auto",
                           template_date=None)  # fmt: skip
    (tmp_path / "adapter").mkdir()
    assert load_run_tokenizer(args).chat_template == "of the base"
    (tmp_path / "adapter" / "chat_template.jinja").write_text("of the adapter")
    assert load_run_tokenizer(args).chat_template == "of the adapter"
    named = tmp_path / "adapter" / "additional_chat_templates"
    named.mkdir()
    (named / "tools.jinja").write_text("with tools")
    assert load_run_tokenizer(args).chat_template == {"default": "of the adapter", "tools": "with tools"}
    args.template_name = "qwen"
    assert load_run_tokenizer(args).chat_template == "of the base"


@pytest.mark.parametrize(("name", "given", "wanted"), [
    ("gpt-oss", None, "2026-01-31"), ("gpt-oss", "2025-12-24", "2025-12-24"), ("qwen2.5", None, None),
])  # fmt: skip
def test_a_format_that_shows_the_date_gets_one_for_the_whole_run(saved, monkeypatch, name, given, wanted):
    monkeypatch.setattr("utils.model.tokenizer.today", lambda: "2026-01-31")
    args = SimpleNamespace(model_name_or_path=saved(), trust_remote_code=False,
                           add_tokens=None, adapter_name_or_path=None,
                           template_name=name, template_date=given)  # fmt: skip
    load_run_tokenizer(args)
    assert args.template_date == wanted
    if wanted:
        assert f"Current date: {wanted}" in get_template(name, date=wanted).render([{"role": "user", "content": "Hi"}])


def test_a_model_stops_after_a_tool_call_as_well():
    tokenizer = copy.deepcopy(tiny.byte_level_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|return|>", "<|call|>"]})
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[0], pad_token_id=None))
    save_chat_format(tokenizer, get_template("gpt-oss", tokenizer), model)
    assert tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id)[::2] == ["<|return|>", "<|call|>"]


def test_a_chat_format_sets_the_template_and_the_stop_token():
    tokenizer = copy.deepcopy(tiny.byte_level_tokenizer())
    template = get_template("qwen", tokenizer)
    apply_chat_format(tokenizer, template)
    assert tokenizer.chat_template == template.to_jinja() and tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parametrize(("before", "after"), [(None, [2]), (0, [2, 0]), ([0, 7], [2, 0, 7]), ([7, 2], [2, 7])])
def test_the_models_stop_tokens_are_kept_after_the_new_one(before, after):
    tokenizer = copy.deepcopy(tiny.byte_level_tokenizer())
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=before, pad_token_id=None))
    save_chat_format(tokenizer, get_template("qwen", tokenizer), model)
    assert tokenizer.eos_token_id == 2
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (after, 0)
    stop_at_eos(model, tokenizer)
    assert model.generation_config.eos_token_id == after


def test_an_adapters_folder_has_no_embedding_to_compare_with(saved, tmp_path):
    folder = saved()
    (tmp_path / "config.json").unlink()
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    assert load_tokenizer(folder).eos_token == "<|endoftext|>"
