"""`--add_tokens`: rows of new tokens, trained, saved, loaded and merged; old tokens as before."""

import copy
import json

import pytest
import tiny
import torch
from conftest import write_rows
from parsing import problems_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from utils.model.adapter import adapter_of
from utils.model.new_tokens import extend_model, extend_tokenizer, read_new_tokens
from utils.runtime.errors import UserError

ROWS = [{"instruction": f"What is {i} + 1?", "output": f"<call>add({i}, 1)<end>"} for i in range(6)]


def model_and_tokenizer(tied, spare=0):
    tokenizer = copy.deepcopy(tiny.byte_level_tokenizer())
    torch.manual_seed(0)
    config = tiny.config_for("qwen2", len(tokenizer) + spare, tie_word_embeddings=tied)
    return AutoModelForCausalLM.from_config(config).float().eval(), tokenizer


def test_three_ways_to_name_them(tmp_path):
    file = tmp_path / "tokens.txt"
    file.write_text("<call>\tcall a function\n\n<end>\n", encoding="utf-8")
    wanted = {"<call>": "call a function", "<end>": None}
    assert read_new_tokens(str(file)) == read_new_tokens(json.dumps(wanted)) == (wanted, [])
    assert read_new_tokens("<call>,<end>") == ({"<call>": None, "<end>": None}, [])


@pytest.mark.parametrize(("value", "said"), [
    ("<a>,,<b>", "the token '' is empty"), ("<a>, <b>", "' <b>' is empty, or has spaces around it"),
    ("<a>,<a>", "'<a>' is given 2 times"), ('{"<a>": 3}', "the description of '<a>' is 3"), ("{", "cannot be read"),
])  # fmt: skip
def test_bad_values_are_named(parse, value, said):
    (problem,) = problems_of(parse, "--add_tokens", value)
    assert said in problem and "give tokens separated by commas" in problem


def test_zero3_is_refused(parse):
    args, _ = parse("--add_tokens", "<a>")
    (problem,) = adapter_of(args).check_zero3(args)
    assert "adds rows to the embedding, which ZeRO-3 splits" in problem.message


@pytest.mark.parametrize("spare", [0, 7])
@pytest.mark.parametrize("tied", [True, False])
def test_rows_start_at_the_mean_and_old_logits_stay(tied, spare):
    model, tokenizer = model_and_tokenizer(tied, spare)
    size = len(tokenizer)
    ids = torch.arange(20)[None]
    before = model(ids).logits[..., :size]
    old = [layer.weight[:size].clone() for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    tokens = {"<call>": None, "<end>": "the end"}
    assert extend_tokenizer(tokenizer, tokens) == [size, size + 1]
    extend_model(model, tokenizer, tokens)
    assert model.config.vocab_size == max(size + spare, size + 2)
    torch.testing.assert_close(model(ids).logits[..., :size], before, rtol=0, atol=1e-6)
    about = tokenizer("the end", add_special_tokens=False)["input_ids"]
    for layer, rows in zip((model.get_input_embeddings(), model.get_output_embeddings()), old, strict=True):
        torch.testing.assert_close(layer.weight[:size], rows, rtol=0, atol=0)
        torch.testing.assert_close(layer.weight[size], rows.mean(0))
        torch.testing.assert_close(layer.weight[size + 1], rows[about].mean(0))
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied
    assert tokenizer.decode(tokenizer("a<call>b<end>")["input_ids"], skip_special_tokens=True) == "a<call>b<end>"


def test_a_token_that_exists_is_refused():
    _, tokenizer = model_and_tokenizer(True)
    with pytest.raises(UserError, match="'<|im_end|>' is a token of"):
        extend_tokenizer(tokenizer, {"<new>": None, "<|im_end|>": None})


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_run_trains_saves_and_merges_them(train, tiny_models, tmp_path, mode):
    """The trained rows, in plain transformers and PEFT, from the run's folder; merged, with the same logits."""
    from peft import PeftModel

    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    folder = train("--add_tokens", '{"<call>": "call", "<end>": null}', "--train_mode", mode, "--max_steps", "3",
                   "--learning_rate", "1e-2", "--precision", "fp32", data=data)  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder)
    size, ids = len(tokenizer), torch.tensor([tokenizer("Hi <call>add<end>")["input_ids"]])
    assert tokenizer.convert_ids_to_tokens([size - 2, size - 1]) == ["<call>", "<end>"]
    start = AutoModelForCausalLM.from_pretrained(tiny_models(), dtype=torch.float32)
    extend_model(start, tokenizer, {"<call>": "call", "<end>": None})
    if mode == "full":
        trained = AutoModelForCausalLM.from_pretrained(folder)
        assert trained.config.vocab_size >= size
    else:
        base = AutoModelForCausalLM.from_pretrained(tiny_models(), dtype=torch.float32)
        if base.config.vocab_size < size:
            base.resize_token_embeddings(size, mean_resizing=False)
        trained = PeftModel.from_pretrained(base, folder).merge_and_unload()
    rows = [model.get_input_embeddings().weight[[size - 2, size - 1]] for model in (start, trained)]
    assert (rows[0] - rows[1]).abs().max() > 1e-3
    if mode == "lora":
        from utils.script.merge_lora import main

        main(["--model_path", str(folder), "--output_dir", str(tmp_path / "merged"), "--dtype", "float32"])
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        assert merged.config.vocab_size >= size
        torch.testing.assert_close(merged(ids).logits, trained(ids).logits, rtol=1e-4, atol=1e-4)
        again = train("--adapter_name_or_path", str(folder), "--max_steps", "1", data=data, output="again")
        assert json.loads((again / "train_args.json").read_text("utf-8"))["common"]["add_tokens"]
        assert len(AutoTokenizer.from_pretrained(again)) == size
