"""`--thinking`: the switch of a chat template, compared with transformers' `apply_chat_template`."""

import copy
import json

import pytest
import tiny
from test_official import NAMES, answer, tokenizer_of, user

from utils.runtime.errors import UserError
from utils.template import get_template
from utils.template.auto import with_defaults
from utils.template.thinking import set_thinking, with_thinking
from utils.template.with_source import with_source_settings

QUESTION = [user("Q-ONE?")]
# families whose prompts change with `enable_thinking`; all other official templates have no switch
SWITCHED = ("qwen3", "qwen3_training", "qwen3_5", "qwen3_6", "qwen3_8", "glm4moe", "nemotron", "gemma4", "diffusion_")
UNSWITCHED = ("qwen3_vl", "qwen3_instruct")
# as the templates of DeepSeek-V3.1 and Mistral Small 4 have them
OTHERS = {
    "thinking": ("{{ '</think>' if thinking is defined and not thinking else '<think>' }}", True, False),
    "reasoning_effort": ("{{ 'low' if reasoning_effort == 'none' else reasoning_effort or 'high' }}", "high", "none"),
}


def has_switch(name):
    return name.startswith(SWITCHED) and not name.startswith(UNSWITCHED)


def prompt_of(tokenizer, **options):
    return tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True, **options)


@pytest.mark.parametrize("name", [n for n in NAMES if has_switch(n)])
def test_the_switch_is_that_of_the_template_and_saved_as_its_default(name):
    official = tokenizer_of(name)
    for mode, value in (("on", True), ("off", False)):
        tokenizer = copy.deepcopy(official)
        set_thinking(tokenizer, mode)
        assert prompt_of(tokenizer) == prompt_of(official, enable_thinking=value)
        for given in (True, False):  # a caller may still choose
            assert prompt_of(tokenizer, enable_thinking=given) == prompt_of(official, enable_thinking=given)
        talk = [*QUESTION, answer("A-ONE.", reasoning_content="T-ONE."), user("Q-TWO?"), answer("A-TWO.")]
        wanted = official.apply_chat_template(talk, tokenize=False, enable_thinking=value)
        assert tokenizer.apply_chat_template(talk, tokenize=False) == wanted
        if name != "glm4moe":  # whose answers end with no token
            template = get_template("auto", official, thinking=mode)
            assert template.to_jinja() == tokenizer.chat_template
            assert template.render(talk) == wanted
            assert template.render(QUESTION, True) == prompt_of(tokenizer)
    assert prompt_of(official, enable_thinking=True) != prompt_of(official, enable_thinking=False)


@pytest.mark.parametrize("name", [n for n in NAMES if not has_switch(n)])
def test_a_template_without_a_switch_is_refused(name):
    for mode in ("on", "off"):
        with pytest.raises(UserError, match=f"--thinking {mode}: the tokenizer's chat template has no switch") as error:
            set_thinking(tokenizer_of(name), mode)
        assert error.value.problems[0].flags == ("thinking", "template_name")
        opens = name.startswith(("deepseek",))
        assert ("each of its prompts opens a thought" in str(error.value)) == opens
    set_thinking(tokenizer_of(name), "auto")


@pytest.mark.parametrize("name", ["qwen", "gpt-oss"])
def test_a_named_format_without_a_switch_is_refused_with_all_other_problems(name, parse):
    with pytest.raises(UserError) as error:
        parse("--template_name", name, "--thinking", "off", "--max_len", "-1")
    problems = [str(problem) for problem in error.value.problems]
    assert any(f"--thinking off: template '{name}' has no switch for thinking" in text for text in problems)
    assert any("--max_len" in text for text in problems)


@pytest.mark.parametrize("name", OTHERS)
def test_other_names_of_the_switch(name):
    opening, on, off = OTHERS[name]
    tokenizer = copy.deepcopy(tiny.byte_level_tokenizer())
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n" + opening + "{% endif %}"
    )
    prompts = {value: prompt_of(tokenizer, **{name: value}) for value in (on, off)}
    for mode, value in (("on", on), ("off", off)):
        changed = copy.deepcopy(tokenizer)
        set_thinking(changed, mode)
        assert prompt_of(changed) == prompts[value]
    # a text that the template only prints is no switch, as the effort of gpt-oss
    tokenizer.chat_template = "{{ reasoning_effort }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    with pytest.raises(UserError, match="has no switch"):
        set_thinking(tokenizer, "off")


def test_a_default_is_replaced_not_repeated():
    once = with_defaults("T", (("enable_thinking", "false"),))
    assert once == "{%- set enable_thinking = enable_thinking if enable_thinking is defined else false %}\nT"
    assert with_defaults(once, (("enable_thinking", "true"),)) == once.replace("false", "true")
    assert with_defaults(with_defaults(once, (("other", "1"),)), ()).count("{%- set") == 2


def test_all_named_templates_get_the_default_and_rows_with_tools_as_well():
    plain = tokenizer_of("qwen3").chat_template
    tokenizer = tokenizer_of("qwen3")
    tokenizer.chat_template = {"default": plain, "tool_use": plain + " ", "rag": "no switch"}
    template = get_template("auto", tokenizer, thinking="off")
    template.save_in(tokenizer)
    heads = {name: text.split("\n")[0] for name, text in tokenizer.chat_template.items()}
    assert {name for name, head in heads.items() if "is defined else false" in head} == {"default", "tool_use"}
    row = [user("Q-ONE?", tools=[])]
    assert template.render(row, True).endswith("<think>\n\n</think>\n\n ")
    tokenizer.chat_template = {"default": plain, "tool_use": get_template("yi").to_jinja()}
    with pytest.raises(UserError, match="has no switch"):
        get_template("auto", tokenizer, thinking="off")


def test_a_source_may_not_set_what_the_flag_sets():
    from types import SimpleNamespace

    template = with_thinking(get_template("auto", tokenizer_of("qwen3")), "off")
    source = SimpleNamespace(name="s", system=None, template_args={"enable_thinking": True})
    with pytest.raises(UserError, match="gives 'enable_thinking', which --thinking sets for all rows"):
        with_source_settings(template, source)


def test_a_run_saves_it_inference_uses_it_and_the_next_run_inherits_it(train, tmp_path, parse):
    from transformers import AutoTokenizer

    from utils.infer.load import TrainedArgs, check_trained, load_format

    official = tokenizer_of("qwen3")
    base = tiny.save_tiny_model(tmp_path / "base", tokenizer=official)
    run = train("--template_name", "auto", "--thinking", "off", "--max_steps", "1", model=base, output="first")
    off, on = (prompt_of(official, enable_thinking=value) for value in (False, True))
    assert prompt_of(AutoTokenizer.from_pretrained(run)) == off != on
    assert json.loads((run / "train_args.json").read_text())["common"]["thinking"] == "off"
    assert "thinking off" in (run / "README.md").read_text()
    for flags, wanted in (({}, off), ({"thinking": "on"}, on), ({"thinking": "off"}, off)):
        args = TrainedArgs(model_path=str(run), **flags)
        parts, problems = check_trained(args)
        assert not problems and prompt_of(load_format(args, parts)) == wanted
    assert parse("--adapter_name_or_path", str(run), "--model_name_or_path", str(base))[0].thinking == "off"
    given = ["--adapter_name_or_path", str(run), "--model_name_or_path", str(base), "--thinking", "auto"]
    assert parse(*given)[0].thinking == "auto"
