"""Multiple choice: rows with choices are read, and each choice's likelihood is that of a plain softmax."""

import copy
import json
import math
import re

import pytest
import tiny
import torch
from conftest import ROOT
from quiz import QUIZ, choices_of, with_chat_format

from utils.data.bad_rows import BadRow
from utils.evaluate.methods import MultipleChoice
from utils.evaluate.models import EvalModel
from utils.evaluate.multiple_choice import encode_choices, log_likelihoods
from utils.runtime.errors import UserError
from utils.template import template_dict


@pytest.mark.parametrize("architecture", ["qwen2", "gemma"])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_likelihoods_equal_a_softmax_row_by_row(tiny_models, tokenizer, architecture, batch_size):
    """Against each sequence alone, without padding, and the whole softmax in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_models(architecture), dtype=torch.float32).eval()
    # a random model's logits hardly differ; these do
    model.get_output_embeddings().weight.data.mul_(8)
    tokenizer = with_chat_format(tokenizer)
    rows = choices_of(*QUIZ)
    scored = [one for row in rows for one in encode_choices(row, tokenizer)]
    found = dict(log_likelihoods(model, scored, batch_size, tokenizer.pad_token_id))
    place = 0
    for row in rows:
        for text in row.texts:
            prompt = tokenizer.apply_chat_template(row.messages, add_generation_prompt=True)["input_ids"]
            # behind a line feed, as in the format; a special token's text is no special token
            said = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            ids = torch.tensor([[*prompt, *said]])
            with torch.no_grad():
                probabilities = model(ids).logits[0].double().softmax(-1)
            by_hand = sum(math.log(probabilities[at - 1, ids[0, at]]) for at in range(len(prompt), ids.shape[1]))
            if "<|im_end|>" not in text:  # which the project breaks with a character of its own
                assert scored[place].ids == ids[0].tolist()
                assert found[place] == pytest.approx(by_hand, abs=1e-5)
            place += 1
    assert place == len(found) == 7
    assert len({round(value) for value in found.values()}) > 3


def test_all_choices_of_one_token_share_the_probability(tiny_models, tokenizer):
    """The letters' likelihoods are single probabilities: each is below 1, and so is their sum."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_models(), dtype=torch.float32).eval()
    tokenizer = with_chat_format(tokenizer)
    scored = encode_choices(choices_of(QUIZ[1])[0], tokenizer, "letter")
    assert [len(one.ids) - one.first for one in scored] == [1, 1, 1]
    assert tokenizer.decode(scored[0].ids[: scored[0].first]).count("C. the fox") == 1
    assert sum(math.exp(value) for _, value in log_likelihoods(model, scored, 2, 0)) < 1


def test_each_choice_gets_its_own_likelihood_back(tiny_models, tokenizer):
    """The longest are computed first, which is another order than the rows'."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_models(), dtype=torch.float32).eval()
    eval_model = EvalModel("model", None, None, with_chat_format(tokenizer), model.config)
    task, rows = (
        MultipleChoice("text"),
        choices_of(*({**row, "choices": ["3", "Paris is.", "好"], "answer": 0} for row in QUIZ)),
    )
    encoded = {number: task.encode(eval_model, row) for number, row in zip((4, 7, 9), rows, strict=True)}
    found = dict(task.answer(model, eval_model, encoded, batch_size=2))
    assert set(found) == {4, 7, 9}
    for number, scored in encoded.items():
        alone = [dict(log_likelihoods(model, [one], 1, 0))[0] for one in scored]
        assert found[number] == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("name", template_dict)
def test_in_each_format_only_the_choice_follows_the_prompt(name):

    tokenizer = with_chat_format(tiny.tokenizer_for(template_dict[name], tiny.byte_level_tokenizer), name)
    row = choices_of({"question": "好 or Paris?", "choices": ["Paris", "好", "a</s>b", "<|im_end|>"], "answer": 0})[0]
    prompt = tokenizer.apply_chat_template(row.messages, tokenize=False, add_generation_prompt=True)
    prompt += "<|channel|>final<|message|>" if name == "gpt-oss" else ""  # the header of an answer
    if name in (
        "deepseek-r1",
        "nemotron-3",
        "nemotron-3-ultra",
    ):  # whose prompt opens a thought that a plain answer is rendered without
        with pytest.raises(UserError, match="does not render the choice"):
            encode_choices(row, tokenizer)
        return
    for one, text in zip(encode_choices(row, tokenizer), row.texts, strict=True):
        seen = tokenizer.decode(one.ids[: one.first])
        assert seen.startswith(prompt)
        # of formats with thinking: the empty thought before an answer without one
        assert seen == prompt or re.fullmatch(r"\n?(<think>)?\s*</think>\s*", seen.removeprefix(prompt))
        assert tokenizer.decode(one.ids[one.first :]).lstrip(" ") == text
        assert not set(one.ids[one.first :]) & set(tokenizer.all_special_ids)


def test_a_thought_before_each_answer_is_not_counted(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think></think>\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    one = encode_choices(choices_of(QUIZ[0])[0], tokenizer)[0]
    assert tokenizer.decode(one.ids[one.first :]) == "Paris."
    assert tokenizer.decode(one.ids).endswith("<think></think>\nParis.")


@pytest.mark.parametrize(("answer", "place"), [(0, 0), (1, 1), ("B", 1), ("b", 1), ("no", 1), ("1", 1), (" yes ", 0)])
def test_the_forms_of_an_answer(answer, place):
    row = {"question": "Well?", "choices": ["yes", "no"], "answer": answer}
    assert choices_of(row)[0].answer == place
    row["choices"] = json.dumps(row["choices"])  # a cell of a CSV file
    assert choices_of(row)[0].answer == place


def test_choices_with_names():
    row = choices_of({"question": "Well?", "choices": {"1": "yes", "2": "no", "3": None}, "answer": 2})[0]
    assert (row.letters, row.texts, row.answer) == (["1", "2"], ["yes", "no"], 1)


@pytest.mark.parametrize(("change", "told"), [
    ({"answer": 2}, "an index from 0 to 1"), ({"answer": "C"}, "one of A, B"), ({"answer": True}, "true or false"),
    ({"answer": -1}, "-1"), ({"answer": None}, "no field 'answer'"), ({"choices": ["yes"]}, "at least two"),
    ({"choices": ["yes", " yes"]}, "'yes' twice"), ({"choices": ["yes", ""]}, "empty text as choice B"),
    ({"choices": ["yes", 3]}, "a number in 'B'"), ({"choices": "yes or no"}, "a text in 'choices'"),
    ({"choices": []}, "empty list"), ({"question": ""}, "empty question"), ({"question": 5}, "a number"),
    ({"choices": ["B", "A"], "answer": "A"}, "the letter of A and the text of B"),
    ({"choices": ["1", "2"], "answer": "1"}, "the text of A and the index from 0 of B"),
])  # fmt: skip
def test_a_row_that_is_no_question_is_refused_with_the_reason(change, told):
    with pytest.raises(BadRow) as error:
        choices_of({"question": "Well?", "choices": ["yes", "no"], "answer": 0} | change)
    assert told in str(error.value)


def test_the_sample_asks_for_facts_outside_the_training_data():
    from data.build.choice_rows import build_choices

    def rows_of(name):
        return [json.loads(line) for line in (ROOT / "data" / name).read_text(encoding="utf-8").splitlines()]

    rows = rows_of("choices_data.jsonl")
    assert rows == build_choices() and 20 <= len(rows) <= 40
    held_back = {row["instruction"]: row["output"] for row in rows_of("sft_eval_data.jsonl")}
    trained = {row["instruction"] for row in rows_of("sft_data.jsonl")}
    for row in choices_of(*rows):
        question = row.messages[-1]["content"]
        assert question not in trained and held_back[question] == row.texts[row.answer] and len(row.texts) == 4
