"""Rendering and labels, against literal texts and against transformers' own chat templates."""

import pytest
import tiny

from utils.errors import UserError
from utils.template import get_template, label_spans, template_dict

MESSAGES = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris is."},
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "再见！\n1 + 2"},
]
WITH_SYSTEM = [{"role": "system", "content": "Be brief."}, *MESSAGES]


def decoded_labels(encoded, tokenizer):
    return tokenizer.decode([label for label in encoded["labels"] if label != -100])


def test_qwen_renders_as_its_official_template():
    """The rendering published for Qwen1.5 (single turn, with its default system message)."""
    assert get_template("qwen").render(MESSAGES[:2]) == (
        "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\nWhat is the capital of France?"
        "<|im_end|>\n<|im_start|>assistant\nParis is.<|im_end|>\n"
    )
    assert get_template("qwen").render(MESSAGES[:1], add_generation_prompt=True).endswith("<|im_start|>assistant\n")


def test_default_uses_the_tokenizers_own_tokens(tokenizer):
    text = get_template("default", tokenizer).render(WITH_SYSTEM[:3])
    assert text == "System: Be brief.\n\nUser: What is the capital of France?\n\nAssistant:\nParis is.<|endoftext|>\n\n"


@pytest.mark.parametrize("name", sorted(template_dict))
@pytest.mark.parametrize("messages", [MESSAGES, WITH_SYSTEM, MESSAGES[:2]])
def test_trained_are_exactly_the_answers_and_their_stop_tokens(name, messages, tokenizer):
    template = get_template(name, tokenizer)
    encoded = template.encode(messages, tokenizer)
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    assert encoded["input_ids"] == tokenizer(template.render(messages), add_special_tokens=False)["input_ids"]
    assert decoded_labels(encoded, tokenizer) == "".join(
        template.before_answer + answer + template.after_answer + template.stop for answer in answers
    )


@pytest.mark.parametrize("name", sorted(template_dict))
@pytest.mark.parametrize("messages", [MESSAGES, WITH_SYSTEM])
def test_the_saved_template_is_the_trained_one(name, messages, tokenizer):
    """transformers' apply_chat_template on `to_jinja()`: the same text, ids and mask."""
    template = get_template(name, tokenizer)
    jinja = template.to_jinja()
    assert tokenizer.apply_chat_template(messages, chat_template=jinja, tokenize=False) == template.render(messages)
    prompt = tokenizer.apply_chat_template(
        messages[:-1], chat_template=jinja, tokenize=False, add_generation_prompt=True
    )
    assert prompt == template.render(messages[:-1], add_generation_prompt=True)
    theirs = tokenizer.apply_chat_template(
        messages, chat_template=jinja, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ours = template.encode(messages, tokenizer)
    assert theirs["input_ids"] == ours["input_ids"]
    assert theirs["assistant_masks"] == [int(label != -100) for label in ours["labels"]]


def test_a_batch_is_encoded_as_its_rows_are(tokenizer):
    template = get_template("qwen", tokenizer)
    rows = [MESSAGES, WITH_SYSTEM, MESSAGES[:2]]
    assert template.encode_batch(rows, tokenizer) == [template.encode(row, tokenizer) for row in rows]


def test_label_spans():
    assert label_spans([7, 8, 9], [(0, 2), (2, 3), (3, 5)], [(2, 5)]) == [-100, 8, 9]
    assert label_spans([7, 8, 9], [(0, 2), (2, 3), (3, 5)], []) == [-100] * 3
    # a character of several tokens, as bytes of an emoji have it, is trained whole
    assert label_spans([1, 2, 3], [(0, 1), (1, 2), (1, 2)], [(1, 2)]) == [-100, 2, 3]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "empty"),
        ([{"role": "robot", "content": "Hi"}], "turn 1 has the role 'robot'"),
        ([{"role": "user", "content": None}], "turn 1 (user)"),
    ],
)
def test_what_a_template_cannot_hold(messages, said):
    with pytest.raises(UserError) as error:
        get_template("qwen").render(messages)
    assert said in str(error.value)


def test_an_unknown_name_shows_the_nearest():
    with pytest.raises(UserError) as error:
        get_template("qwenn")
    assert "'qwenn'" in str(error.value) and "Did you mean 'qwen'" in str(error.value)


def test_a_stop_token_the_tokenizer_does_not_have_is_refused(tmp_path):
    import copy

    tokenizer = copy.deepcopy(tiny.byte_level_tokenizer())
    bare = tokenizer.train_new_from_iterator(tiny.TEXT, 400)
    bare.add_special_tokens({"eos_token": "<|endoftext|>"})
    if len(bare("<|im_end|>", add_special_tokens=False)["input_ids"]) > 1:
        with pytest.raises(UserError) as error:
            get_template("qwen", bare)
        assert "must be one" in str(error.value)


def test_special_tokens_of_a_template(tokenizer):
    assert get_template("qwen", tokenizer).special_tokens(tokenizer) == ["<|im_end|>", "<|im_start|>"]
    assert get_template("default", tokenizer).special_tokens(tokenizer) == ["<|endoftext|>"]
