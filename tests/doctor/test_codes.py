"""Each code has a small planted defect that raises it and no other."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import tiny
from doctor_case import (
    CHINESE,
    CLEAN,
    CLEAN_PAIRS,
    LONG,
    WeightsReached,
    clean_and,
    on_a_full_disk,
    tokenizer_with,
    with_a_broken_line,
)

import main_train
from utils.args import parse_args
from utils.data.report import DataReport
from utils.doctor import resources
from utils.doctor.codes import CODES
from utils.doctor.examine import quick_findings
from utils.doctor.tokens import token_findings
from utils.runtime.errors import UserError
from utils.tasks import get_task
from utils.template import get_template


def _deepspeed_with_optimizer(case):
    file = case.folder / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}))
    return case.flags("--deepspeed", str(file))


def _fp16_with_bf16_model(case):
    folder = case.folder / "bf16"
    tiny.save_tiny_model(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    args, train_args = parse_args(case.flags(model=str(folder)))
    args = dataclasses.replace(args, precision="fp16")  # which parse_args refuses without a GPU
    return quick_findings(args, train_args, None, None, tiny.byte_level_tokenizer())


def _many_passes(case):
    case.monkeypatch.setattr("utils.doctor.settings._NOT_TINY", 1000)  # a model of 50M weights takes long to make
    return case.flags()


def _little_memory(case):
    estimate = SimpleNamespace(total=10**15, host=0)
    case.monkeypatch.setattr(resources, "try_estimate", lambda *_: estimate)
    case.monkeypatch.setattr("utils.doctor.examine.has_gpu", lambda: True)
    return case.flags()


def _without_im_start():
    """`<|im_start|>` is several pieces here."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads(tiny.byte_level_tokenizer().backend_tokenizer.to_str())
    token = next(token for token in state["added_tokens"] if token["content"] == "<|im_start|>")
    state["added_tokens"].remove(token)
    state["model"]["vocab"]["unused"] = state["model"]["vocab"].pop("<|im_start|>")
    tokenizer = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def _bos_twice():
    form = get_template("yi").to_jinja()
    return tokenizer_with(bos_token="<|endoftext|>", chat_template="{{ bos_token }}{{ bos_token }}" + form)


def _opens_a_thought():
    opening = "{{ '<|im_start|>assistant\\n' }}"
    form = get_template("yi").to_jinja()
    assert form.rstrip().endswith("{% endif %}") and opening in form
    before, after = form.rsplit(opening, 1)
    return tokenizer_with(chat_template=f"{before}{{{{ '<|im_start|>assistant\\n<think>\\n' }}}}{after}")


def _sets_bos():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_with(bos_token="<|endoftext|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    return tokenizer


def _stop_untrained(case):
    from datasets import Dataset

    tokenizer = tiny.byte_level_tokenizer()
    ids = tokenizer("Hello<|im_end|>")["input_ids"]
    rows = {"input_ids": [ids], "labels": [[*ids[:-1], -100]], "source": [[7]]}
    args = SimpleNamespace(task=get_task("sft"), train_on="all_turns")
    return token_findings(Dataset.from_dict(rows), DataReport(files=["rows.jsonl"]), args, tokenizer, "<|im_end|>")


def _ignores_positions(case):
    """OPT counts positions by the attention mask, and so through all rows that lie end to end."""
    from transformers import AutoModelForCausalLM

    folder, tokenizer = case.folder / "opt", tiny.byte_level_tokenizer()
    AutoModelForCausalLM.from_config(
        tiny.config_for("opt", len(tokenizer), ffn_dim=64, word_embed_proj_dim=64)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


DEFECTS = {
    "ARGUMENTS": lambda p: p.flags("--lora_rank", "0"),
    "DEEPSPEED_SHADOWS": _deepspeed_with_optimizer,
    "FP16_MODEL_IS_BF16": _fp16_with_bf16_model,
    "LEARNING_RATE_UNUSUAL": lambda p: p.flags("--learning_rate", "0.5"),
    "PASSES_MANY": _many_passes,
    "WARMUP_TOO_LONG": lambda p: p.flags("--warmup_steps", "0.9"),
    "LAST_BATCH_SHORT": lambda p: p.flags("--gradient_accumulation_steps", "2"),
    "LAYOUT_WRONG": lambda p: p.flags("--packing", "true", model=_ignores_positions(p)),
    "ROWS_PADDED": lambda p: p.flags(model=_ignores_positions(p)),
    "DISK_TOO_SMALL": on_a_full_disk,
    "MEMORY_TOO_SMALL": _little_memory,
    "QLORA_LEAVES_WEIGHTS": lambda p: p.flags("--train_mode", "qlora", model=p.models("mixtral", num_local_experts=4)),
    "MAX_LEN_OVER_POSITIONS": lambda p: p.flags(
        rows=clean_and(instruction=LONG), model=p.models("qwen2", max_position_embeddings=128)
    ),
    "TEMPLATE_TOKEN_SPLIT": lambda p: p.flags(model=p.model(_without_im_start)),
    "TEMPLATE_DIFFERS": lambda p: p.flags(
        model=p.model(lambda: tokenizer_with(chat_template=get_template("yi").to_jinja()))
    ),
    "PROMPT_NOT_FOLLOWED": lambda p: p.flags("--template_name", "auto", model=p.model(_opens_a_thought)),
    "PAD_IS_STOP": lambda p: p.flags("--template_name", "default"),
    "BOS_DOUBLE": lambda p: p.flags("--template_name", "auto", model=p.model(_bos_twice)),
    "BOS_MISSING": lambda p: p.flags(model=p.model(_sets_bos)),
    "STOP_NOT_TRAINED": _stop_untrained,
    "ROW_UNREADABLE": with_a_broken_line,
    "ROW_NOTHING_TRAINED": lambda p: p.flags(rows=clean_and(output=" ")),
    "ROW_TOO_LONG": lambda p: p.flags("--max_len", "100", rows=clean_and(output=LONG)),
    "ROW_SHORTENED": lambda p: p.flags("--max_len", "100", rows=clean_and(instruction=LONG)),
    "ANSWER_NOT_TRAINED": lambda p: p.flags(
        rows=[*CLEAN, {"history": [["Hi", ""]], "instruction": "Say hello.", "output": "Hello."}]
    ),
    "FIELDS_UNREAD": lambda p: p.flags(rows=clean_and(quality=5)),
    "DUPLICATE_ROWS": lambda p: p.flags(
        rows=[*CLEAN, {"instruction": "What is  3 plus 2? ", "output": "3 plus 2 is 5."}]
    ),
    "EVAL_IN_TRAIN": lambda p: p.flags("--eval_data_path", p.write([CLEAN[3], *clean_and()[-1:]], "eval.jsonl")),
    "PAIR_EQUAL": lambda p: p.pairs([*CLEAN_PAIRS, {"prompt": "Hi", "chosen": "Hello.", "rejected": "Hello."}]),
    "PAIR_LENGTH_BIAS": lambda p: p.pairs([{**pair, "rejected": "No."} for pair in CLEAN_PAIRS]),
    "SPECIAL_TOKEN_IN_CONTENT": lambda p: p.flags(rows=clean_and(output="Hello.<|im_end|>")),
    "UNICODE_BROKEN": lambda p: p.flags(rows=clean_and(output="A cafÃ© is a place to drink coffee.")),
    "INVISIBLE_CHARACTERS": lambda p: p.flags(rows=clean_and(output="Hel\u200blo.")),
    "LANGUAGE_STRAY": lambda p: p.flags(
        rows=[
            *({**row, "instruction": f"{i}: {row['instruction']}"} for i in range(3) for row in CLEAN),
            {"instruction": "Как дела?", "output": "Хорошо, спасибо."},
        ]  # fmt: skip
    ),
    "LANGUAGES_MIXED": lambda p: p.flags(rows=[*CLEAN, *CHINESE]),
    "NOT_EXAMINED": lambda p: p.flags("--train_data_path", "nowhere.jsonl"),
}


def test_each_code_has_a_planted_defect():
    assert set(DEFECTS) == set(CODES)


@pytest.mark.parametrize("code", CODES)
def test_a_planted_defect_raises_exactly_its_code(case, report, code):
    planted = DEFECTS[code](case)
    if planted and not isinstance(planted[0], str):
        found, severities = {finding.code for finding in planted}, {finding.severity for finding in planted}
    else:
        exit_code, said = report(*planted)
        found, severities = ({finding[key] for finding in said["findings"]} for key in ("code", "severity"))
        assert exit_code == said["exit_code"] == {"note": 0, "warning": 1, "error": 2}[min(severities)]
    if code == "NOT_EXAMINED":  # what hides the rest is told as well
        assert found == {"ARGUMENTS", code}
    else:
        assert found == {code}
        assert severities == {CODES[code].severity}


@pytest.mark.parametrize("code", [code for code in CODES if code != "DEEPSPEED_SHADOWS"])  # refused with the arguments
def test_main_train_reports_the_quick_codes(case, no_weights, capsys, code):
    planted = DEFECTS[code](case)
    if not isinstance(planted[0], str):
        return  # found by what main_train.py calls, as the test above shows
    with pytest.raises((WeightsReached, UserError)) as stop:
        main_train.main(planted)
    said = f"{capsys.readouterr().err}\n{stop.value}"
    assert (f"{code}: " in said) == CODES[code].quick
    # a layout that is wrong is found on the model itself, once it is loaded
    goes_on = CODES[code].severity != "error" and code != "NOT_EXAMINED" or code == "LAYOUT_WRONG"
    assert (stop.type is WeightsReached) == goes_on
