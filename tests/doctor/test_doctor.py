"""The doctor: each code has a small planted defect that raises it and no other, and a clean corpus raises none."""

import dataclasses
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from conftest import ROOT, write_rows

import main_train
from utils.args import parse_args
from utils.doctor import resources as doctor_sizes
from utils.doctor.codes import CODES
from utils.doctor.examine import quick_findings
from utils.doctor.findings import catalogue
from utils.doctor.settings import deepspeed_keys
from utils.doctor.tokens import token_findings
from utils.model import meta
from utils.model.tokenizer import tokenizer_of
from utils.runtime.errors import UserError
from utils.script import doctor
from utils.tasks import get_task
from utils.template import get_template
from utils.train.plan import steps_of

CLEAN = [
    {"instruction": f"What is {first} plus {second}?", "output": f"{first} plus {second} is {first + second}."}
    for first in range(10)
    for second in range(4)
]
# of the two answers now one is the longer, now the other
CLEAN_PAIRS = [
    {
        "prompt": row["instruction"],
        "chosen": row["output"],
        "rejected": ("No. ", "I do not know that at all. ")[i % 2] * 3,
    }
    for i, row in enumerate(CLEAN)
]
CHINESE = [{"instruction": f"{number}的后面是几？", "output": f"后面是{number + 1}。"} for number in range(40)]
LONG = "the quick brown fox " * 60


ESTIMATED = doctor_sizes.try_estimate


@pytest.fixture(autouse=True)
def no_estimate(monkeypatch):
    """An estimate takes half a second; what is done with one is tested below."""
    monkeypatch.setattr(doctor_sizes, "try_estimate", lambda *_: None)


class Patient:
    """A run to look at: flags, rows and a model, each to be spoilt."""

    def __init__(self, folder, tiny_models, monkeypatch):
        self.folder, self.models, self.monkeypatch = folder, tiny_models, monkeypatch

    def write(self, rows, name="rows.jsonl"):
        return write_rows(self.folder / name, rows)

    def flags(self, *more, rows=CLEAN, model=None):
        return ["--model_name_or_path", model or self.models(), "--train_data_path", self.write(rows),
                "--output_dir", str(self.folder / "run"), "--cache_dir", str(self.folder / "cache"), *more]  # fmt: skip

    def pairs(self, rows):
        return ["--train_args_path", "train_args/dpo/base.py", *self.flags(rows=rows)]

    def model(self, change):
        """A tiny model whose tokenizer `change` has spoilt; returns its folder."""
        tokenizer = change()
        return tiny.save_tiny_model(self.folder / "model", tokenizer=tokenizer)


@pytest.fixture
def patient(tmp_path, tiny_models, monkeypatch):
    return Patient(tmp_path, tiny_models, monkeypatch)


@pytest.fixture
def report(capsys):
    """Runs the command; returns its exit code and its JSON report."""

    def run(*argv):
        capsys.readouterr()
        code = doctor.main(["--json", "true", *argv])
        return code, json.loads(capsys.readouterr().out)

    return run


class Loaded(Exception):
    pass


@pytest.fixture
def no_weights(monkeypatch):
    """main_train.py comes as far as the weights, and no farther."""

    def load(*_):
        raise Loaded

    monkeypatch.setattr("utils.model.load.load_model", load)


# ------------------------------------------------------------------ a planted defect for each code
# each returns the command's flags, or the findings where no command can be given the defect on this machine


def _deepspeed_with_optimizer(patient):
    file = patient.folder / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}))
    return patient.flags("--deepspeed", str(file))


def _fp16_with_bf16_model(patient):
    folder = patient.folder / "bf16"
    tiny.save_tiny_model(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    args, train_args = parse_args(patient.flags(model=str(folder)))
    args = dataclasses.replace(args, precision="fp16")  # which parse_args refuses without a GPU
    return quick_findings(args, train_args, None, None, tiny.byte_level_tokenizer())


def _full_disk(patient):
    patient.monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10_000))
    return patient.flags()


def _little_memory(patient):
    estimate = SimpleNamespace(total=10**15, host=0)
    patient.monkeypatch.setattr(doctor_sizes, "try_estimate", lambda *_: estimate)
    patient.monkeypatch.setattr("utils.doctor.examine.has_gpu", lambda: True)
    return patient.flags()


def _tokenizer(**changes):
    import copy

    tokenizer = copy.deepcopy(tiny.byte_level_tokenizer())
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


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
    return _tokenizer(bos_token="<|endoftext|>", chat_template="{{ bos_token }}{{ bos_token }}" + form)


def _opens_a_thought():
    opening = "{{ '<|im_start|>assistant\\n' }}"
    form = get_template("yi").to_jinja()
    assert form.rstrip().endswith("{% endif %}") and opening in form
    before, after = form.rsplit(opening, 1)
    return _tokenizer(chat_template=f"{before}{{{{ '<|im_start|>assistant\\n<think>\\n' }}}}{after}")


def _sets_bos():
    from tokenizers.processors import TemplateProcessing

    tokenizer = _tokenizer(bos_token="<|endoftext|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    return tokenizer


def _stop_untrained(patient):
    from datasets import Dataset

    tokenizer = tiny.byte_level_tokenizer()
    ids = tokenizer("Hello<|im_end|>")["input_ids"]
    rows = {"input_ids": [ids], "labels": [[*ids[:-1], -100]], "source": [[7]]}
    args = SimpleNamespace(task=get_task("sft"))
    return token_findings(Dataset.from_dict(rows), ["rows.jsonl"], args, tokenizer, "<|im_end|>")


def _not_json(patient):
    flags = patient.flags()
    with open(patient.folder / "rows.jsonl", "a", encoding="utf-8") as file:
        file.write('{"instruction": "Hi", \n')
    return flags


def _row(**row):
    return [*CLEAN, {"instruction": "Say hello.", "output": "Hello.", **row}]


def _ignores_positions(patient):
    """OPT counts positions by the attention mask, and so through all rows that lie end to end."""
    from transformers import AutoModelForCausalLM

    folder, tokenizer = patient.folder / "opt", tiny.byte_level_tokenizer()
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
    "WARMUP_TOO_LONG": lambda p: p.flags("--warmup_steps", "0.9"),
    "LAST_BATCH_SHORT": lambda p: p.flags("--gradient_accumulation_steps", "2"),
    "LAYOUT_WRONG": lambda p: p.flags("--packing", "true", model=_ignores_positions(p)),
    "ROWS_PADDED": lambda p: p.flags(model=_ignores_positions(p)),
    "DISK_TOO_SMALL": _full_disk,
    "MEMORY_TOO_SMALL": _little_memory,
    "QLORA_LEAVES_WEIGHTS": lambda p: p.flags("--train_mode", "qlora", model=p.models("mixtral", num_local_experts=4)),
    "MAX_LEN_OVER_POSITIONS": lambda p: p.flags(
        rows=_row(instruction=LONG), model=p.models("qwen2", max_position_embeddings=128)
    ),
    "TEMPLATE_TOKEN_SPLIT": lambda p: p.flags(model=p.model(_without_im_start)),
    "TEMPLATE_DIFFERS": lambda p: p.flags(
        model=p.model(lambda: _tokenizer(chat_template=get_template("yi").to_jinja()))
    ),
    "PROMPT_NOT_FOLLOWED": lambda p: p.flags("--template_name", "auto", model=p.model(_opens_a_thought)),
    "PAD_IS_STOP": lambda p: p.flags("--template_name", "default"),
    "BOS_DOUBLE": lambda p: p.flags("--template_name", "auto", model=p.model(_bos_twice)),
    "BOS_MISSING": lambda p: p.flags(model=p.model(_sets_bos)),
    "STOP_NOT_TRAINED": _stop_untrained,
    "ROW_UNREADABLE": _not_json,
    "ROW_NOTHING_TRAINED": lambda p: p.flags(rows=_row(output=" ")),
    "ROW_TOO_LONG": lambda p: p.flags("--max_len", "100", rows=_row(output=LONG)),
    "ROW_SHORTENED": lambda p: p.flags("--max_len", "100", rows=_row(instruction=LONG)),
    "ANSWER_NOT_TRAINED": lambda p: p.flags(
        rows=[*CLEAN, {"history": [["Hi", ""]], "instruction": "Say hello.", "output": "Hello."}]
    ),
    "FIELDS_UNREAD": lambda p: p.flags(rows=_row(quality=5)),
    "DUPLICATE_ROWS": lambda p: p.flags(
        rows=[*CLEAN, {"instruction": "What is  3 plus 2? ", "output": "3 plus 2 is 5."}]
    ),
    "EVAL_IN_TRAIN": lambda p: p.flags("--eval_data_path", p.write([CLEAN[3], *_row()[-1:]], "eval.jsonl")),
    "PAIR_EQUAL": lambda p: p.pairs([*CLEAN_PAIRS, {"prompt": "Hi", "chosen": "Hello.", "rejected": "Hello."}]),
    "PAIR_LENGTH_BIAS": lambda p: p.pairs([{**pair, "rejected": "No."} for pair in CLEAN_PAIRS]),
    "SPECIAL_TOKEN_IN_CONTENT": lambda p: p.flags(rows=_row(output="Hello.<|im_end|>")),
    "UNICODE_BROKEN": lambda p: p.flags(rows=_row(output="A cafÃ© is a place to drink coffee.")),
    "INVISIBLE_CHARACTERS": lambda p: p.flags(rows=_row(output="Hel\u200blo.")),
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
def test_a_planted_defect_raises_exactly_its_code(patient, report, code):
    planted = DEFECTS[code](patient)
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
def test_main_train_sees_the_quick_ones(patient, no_weights, capsys, code):
    planted = DEFECTS[code](patient)
    if not isinstance(planted[0], str):
        return  # found by what main_train.py calls, as the test above shows
    with pytest.raises((Loaded, UserError)) as stop:
        main_train.main(planted)
    said = f"{capsys.readouterr().err}\n{stop.value}"
    assert (f"{code}: " in said) == CODES[code].quick
    # a layout that is wrong is found on the model itself, once it is loaded
    goes_on = CODES[code].severity != "error" and code != "NOT_EXAMINED" or code == "LAYOUT_WRONG"
    assert (stop.type is Loaded) == goes_on


def test_a_clean_corpus_raises_none(patient, report):
    assert report(*patient.flags())[1]["findings"] == []
    assert report(*patient.pairs(CLEAN_PAIRS))[1]["findings"] == []
    code, said = report(*patient.flags("--val_size", "0.2"))
    assert (code, said["verdict"], said["examined"]["rows"]) == (0, "clean", 40)


@pytest.mark.parametrize("recipe", ["sft", "pretrain", "dpo"])
def test_the_samples_are_ready_to_train(recipe, tmp_path, report):
    """They are of two languages, which is told; nothing stands against them."""
    flags = ("--output_dir", str(tmp_path / "run"), "--cache_dir", str(tmp_path / "cache"))
    code, said = report("--train_args_path", f"train_args/{recipe}/base.py", *flags)
    assert code == 0
    assert {finding["code"] for finding in said["findings"]} == {"LANGUAGES_MIXED"}


# ------------------------------------------------------------------ what is said


def test_places_and_counts(patient, report):
    rows = _row(output="") + [{"instruction": 7, "output": "x"}, {"instruction": "Hi", "output": "Caf\ufffd"}]
    code, said = report(*patient.flags(rows=[*rows, {"instruction": "Go\u202e", "output": "No"}]))
    assert code == 2
    assert {f["code"]: [(p["count"], p["lines"]) for p in f["places"]] for f in said["findings"]} == {
        "ROW_UNREADABLE": [(1, [42])],
        "ROW_NOTHING_TRAINED": [(1, [41])],
        "UNICODE_BROKEN": [(1, [43])],
        "INVISIBLE_CHARACTERS": [(1, [44])],
    }
    assert said["findings"][0]["places"][0]["file"] == str(patient.folder / "rows.jsonl")


@pytest.mark.parametrize("more", [[], ["--template_name", "none"]], ids=["prepared", "read alone"])
def test_rows_that_cannot_be_read_for_their_unicode_are_told_apart(patient, report, more):
    """Also where the rows are not prepared, since a flag cannot be used."""
    flags = _not_json(patient)
    with open(patient.folder / "rows.jsonl", "ab") as file:
        file.write(b'{"instruction": "caf\xe9", "output": "b"}\n{"instruction": "a", "output": "\\ud800"}\n')
    _, said = report(*flags, *more, "--on_bad_row", "drop")
    places = {finding["code"]: finding["places"][0]["lines"] for finding in said["findings"] if finding["places"]}
    line = len(CLEAN) + 1
    assert (places["ROW_UNREADABLE"], places["UNICODE_BROKEN"]) == ([line], [line + 1, line + 2])


def test_on_bad_row_decides_how_bad(patient, report):
    flags = patient.flags(rows=_row(output=""))
    assert [report(*flags, "--on_bad_row", choice)[0] for choice in ("auto", "drop", "error")] == [1, 1, 2]
    flags = _not_json(patient)
    assert [report(*flags, "--on_bad_row", choice)[0] for choice in ("auto", "drop")] == [2, 1]


def test_broken_arguments_do_not_hide_the_rows(patient, report):
    flags = patient.flags("--lora_rank", "0", "--learning_rat", "1", "--max_grad_norm", "-1", rows=_row(output=""))
    (patient.folder / "run").mkdir()
    (patient.folder / "run" / "train.log").write_text("of another run")
    code, said = report(*flags)
    problems = [f["message"] for f in said["findings"] if f["code"] == "ARGUMENTS"]
    for part in ("--lora_rank 0", "--learning_rat is not a flag", "--max_grad_norm -1", "already holds 'train.log'"):
        assert sum(part in problem for problem in problems) == 1, problems
    assert [f["code"] for f in said["findings"] if f["code"] != "ARGUMENTS"] == ["ROW_NOTHING_TRAINED"]
    assert said["examined"]["set_aside"] == ["learning_rat", "lora_rank", "max_grad_norm", "output_dir"]


def test_rows_are_looked_at_without_a_model(patient, report):
    code, said = report(*patient.flags(rows=_row(output="Hel\u200blo."), model="nowhere/at/all"))
    assert {f["code"] for f in said["findings"]} == {"ARGUMENTS", "NOT_EXAMINED", "INVISIBLE_CHARACTERS"}
    assert (said["examined"]["model_name_or_path"], said["examined"]["rows"]) == (None, 41)
    code, said = report(*patient.flags(rows=_row(output=""), model="nowhere/at/all"))
    assert [f["places"][0]["lines"] for f in said["findings"] if f["code"] == "ROW_NOTHING_TRAINED"] == [[41]]


def test_rows_are_looked_at_without_a_template(patient, report):
    code, said = report(*patient.flags("--template_name", "llama3", rows=_row(output="Hel\u200blo.")))
    assert code == 2
    assert [f["code"] for f in said["findings"]] == ["TEMPLATE_TOKEN_SPLIT", "INVISIBLE_CHARACTERS", "NOT_EXAMINED"]


def test_a_file_that_is_cut_off_is_told_once(patient, report):
    file = patient.folder / "cut.json"
    file.write_text(json.dumps(CLEAN)[:-9])
    code, said = report(*patient.flags("--train_data_path", str(file)))
    assert (code, [f["code"] for f in said["findings"]]) == (2, ["ROW_UNREADABLE"])


@pytest.mark.parametrize(
    ("rows", "flags", "code"),
    [
        ([{"instruction": "Hi", "output": ""}], (), "ROW_NOTHING_TRAINED"),
        ([{"prompt": "Hi", "chosen": "a", "rejected": "b"}], ("--on_bad_row", "drop"), "ROW_UNREADABLE"),
        ([{"instruction": "Hi", "output": LONG}], ("--max_len", "50"), "ROW_TOO_LONG"),
        ([{"messages": [{"role": "user", "content": "Hi"}] * 2 + [{"role": "assistant", "content": "Ho"}]}],
         ("--template_name", "mistral"), "ROW_UNREADABLE"),
        ([], (), "ROW_NOTHING_TRAINED"),
    ],
)  # fmt: skip
def test_no_row_left(patient, report, rows, flags, code):
    model = patient.model(lambda: tiny.tokenizer_for(get_template("mistral"), tiny.byte_level_tokenizer))
    exit_code, said = report(*patient.flags(*flags, rows=rows, model=model))
    assert [(f["code"], f["severity"]) for f in said["findings"]] == [(code, "error")]
    assert exit_code == 2


@pytest.mark.parametrize("flags", [("--train_args_path", "nowhere.py"), ("--task_type", "dpo_multi")])
def test_rows_of_an_unknown_task_are_not_looked_at(patient, report, flags):
    code, said = report(*patient.flags(*flags))
    assert (code, [f["code"] for f in said["findings"]]) == (2, ["ARGUMENTS", "NOT_EXAMINED"])
    assert said["examined"]["rows"] == 0


def test_rows_held_back_that_repeat_trained_ones(patient, report):
    said = report(*patient.flags("--val_size", "20", rows=[*CLEAN, *CLEAN]))[1]
    assert "EVAL_IN_TRAIN" in {finding["code"] for finding in said["findings"]}


def test_a_check_that_fails_stops_nothing(patient, no_weights, report, monkeypatch):
    monkeypatch.setattr("utils.doctor.examine.template_findings", lambda *_: 1 / 0)
    code, said = report(*patient.flags())
    assert (code, [f["code"] for f in said["findings"]]) == (0, ["NOT_EXAMINED"])
    assert "ZeroDivisionError" in said["findings"][0]["message"]
    with pytest.raises(Loaded):
        main_train.main(patient.flags())


def test_a_check_that_fails_is_told_without_its_stack(patient, report, monkeypatch):
    def fail(*_):
        raise ValueError("too large\nException raised from unpack (most recent call first):\nframe #0")

    monkeypatch.setattr("utils.doctor.examine.template_findings", fail)
    _, said = report(*patient.flags())
    assert said["findings"][0]["message"] == "the template: ValueError: too large"


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": -5},
        {"num_attention_heads": 0},
        {"model_type": "t5", "architectures": None},
        {"intermediate_size": 20},  # can be built, and is none that the weights fit
    ],
)
def test_a_model_that_cannot_be_built_is_an_error(patient, report, changes):
    folder = Path(tiny.save_tiny_model(patient.folder / "model"))
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    code, said = report(*patient.flags(model=str(folder)))
    errors = [finding for finding in said["findings"] if finding["severity"] == "error"]
    assert (code, [finding["code"] for finding in errors]) == (2, ["ARGUMENTS"])
    assert str(folder) in errors[0]["message"]


@pytest.mark.parametrize("task", ["sft", "pretrain", "dpo"])
def test_how_long_the_rows_are_that_do_not_fit(patient, report, tokenizer, task):
    """The figures are those of the tokenizer on the whole row."""
    template = get_template("qwen", tokenizer)
    row = {"sft": _row(output=LONG)[-1], "pretrain": {"text": LONG},
           "dpo": {"prompt": "Say hello.", "chosen": LONG, "rejected": "No."}}[task]  # fmt: skip
    messages = [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": LONG}]
    text = LONG + tokenizer.eos_token if task == "pretrain" else template.render(messages)
    wanted = len(tokenizer(text)["input_ids"])
    recipe = ("--train_args_path", f"train_args/{task}/base.py", *(("--packing", "false") if task != "dpo" else ()))
    clean = {"sft": CLEAN, "pretrain": [{"text": r["output"]} for r in CLEAN], "dpo": CLEAN_PAIRS}[task]
    said = report(*patient.flags(*recipe, "--max_len", "100", rows=[*clean, row]))[1]
    message = next(f["message"] for f in said["findings"] if f["code"] == "ROW_TOO_LONG")
    assert f"1 of them measured: {wanted} to {wanted} tokens" in message


def test_a_question_asked_in_both_with_another_answer(patient, report):
    other = patient.write([{**CLEAN[3], "output": "I do not know."}, *_row()[-1:]], "eval.jsonl")
    (finding,) = report(*patient.flags("--eval_data_path", other))[1]["findings"]
    begins = "1 row of 2 for validation have a question that is in the training rows too, 0 with"
    assert finding["message"].startswith(begins)
    assert finding["places"] == [{"file": other, "count": 1, "lines": [1]}]


def test_latin_rows_are_no_strangers(patient, report):
    """Code, names and formulas are Latin in every corpus."""
    rows = [{**row, "instruction": f"第{i}题：{row['instruction']}"} for i in range(5) for row in CHINESE]
    assert report(*patient.flags(rows=[*rows, CLEAN[0]]))[1]["findings"] == []


def test_one_bos_is_as_it_should_be(patient, report):
    form = get_template("yi").to_jinja()
    spoilt = patient.model(lambda: _tokenizer(bos_token="<|endoftext|>", chat_template="{{ bos_token }}" + form))
    assert report(*patient.flags("--template_name", "auto", model=spoilt))[1]["findings"] == []


def test_text_for_a_person(patient, capsys):
    assert doctor.main(patient.flags("--learning_rate", "0.5", rows=_row(output=""))) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "warning LEARNING_RATE_UNUSUAL"
    assert f"  {patient.folder}/rows.jsonl: line 41" in lines
    assert lines[-2] == "looked at 41 training rows and 0 validation rows"
    assert lines[-1] == "verdict: 0 errors, 2 warnings, 0 notes – it will train; look at the warnings first"


def test_help_and_own_flags(capsys, refused):
    with pytest.raises(SystemExit) as stop:
        doctor.main(["--help"])
    assert stop.value.code == 0
    assert "--processes" in capsys.readouterr().out
    assert "--processes -1 is not allowed" in refused(doctor.main, "--processes", "-1")


def test_another_format_names_the_flag_that_trains_the_tokenizers_own(patient, report):
    """A registered one by its name, any other as auto; both in the line that the log has."""
    for form, name in ((get_template("yi").to_jinja(), "qwen3"), (_ODD, "auto")):
        model = patient.model(lambda form=form: _tokenizer(chat_template=form))
        findings = report(*patient.flags(model=model))[1]["findings"]
        (finding,) = (finding for finding in findings if finding["code"] == "TEMPLATE_DIFFERS")
        assert f"give --template_name {name}" in finding["message"]


# ChatML with another opening
_ODD = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}:\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:\n{% endif %}"
)


def test_the_page_of_codes_is_not_stale():
    """utils/script/doctor.md is what `doctor --write_codes true` would write."""
    assert doctor.CODES_PAGE.read_text(encoding="utf-8") == catalogue()
    assert doctor.CODES_PAGE.is_relative_to(ROOT)


# ------------------------------------------------------------------ the quick part of main_train.py


def test_main_train_stops_on_errors_before_the_weights(patient, no_weights, refused):
    said = refused(main_train.main, *_full_disk(patient), "--template_name", "default")
    assert "DISK_TOO_SMALL: 3 checkpoints" in said
    assert "PAD_IS_STOP" not in said.partition("error: ")[2]  # a warning, in the log
    with pytest.raises(Loaded):
        main_train.main([*patient.flags(), "--doctor", "off"])


def test_main_train_goes_on_with_warnings(patient, no_weights, capsys):
    with pytest.raises(Loaded):
        main_train.main([*patient.flags(), "--learning_rate", "0.5"])
    said = capsys.readouterr().err
    assert said.count("LEARNING_RATE_UNUSUAL") == 1
    assert "python -m utils.script.doctor" in said


def test_looking_changes_no_random_number(patient, monkeypatch):
    import torch

    monkeypatch.setattr(doctor_sizes, "try_estimate", ESTIMATED)

    args, train_args = parse_args(patient.flags())
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    meta._SIZES.clear()
    quick_findings(args, train_args, None, None, tiny.byte_level_tokenizer())
    assert torch.equal(torch.rand(3), wanted)


def test_under_zero3_no_model_is_split_to_be_looked_at(patient, monkeypatch):
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    args, train_args = parse_args(patient.flags())
    train_args.hf_deepspeed_config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    seen = []
    monkeypatch.setattr(
        "utils.doctor.examine.settings_findings", lambda *_: seen.append(is_deepspeed_zero3_enabled()) or []
    )
    quick_findings(args, train_args, None, None, tiny.byte_level_tokenizer())
    assert seen == [False]
    assert is_deepspeed_zero3_enabled()


# ------------------------------------------------------------------ sizes and settings


@pytest.mark.parametrize(
    ("weights", "mode", "rate", "unusual"),
    [
        (4_000_000, "lora", "2e-3", False),
        (7_000_000_000, "lora", "2e-3", True),
        (7_000_000_000, "lora", "2e-4", False),
        (7_000_000_000, "full", "2e-4", True),
        (7_000_000_000, "full", "1e-5", False),
        (7_000_000_000, "lora", "1e-7", True),
    ],
)
def test_usual_learning_rates(patient, monkeypatch, weights, mode, rate, unusual):
    size = meta.ModelSize(weights, weights, None, False)
    monkeypatch.setattr("utils.doctor.settings.model_size_or_none", lambda _: size)
    monkeypatch.setattr(doctor_sizes, "model_size_or_none", lambda _: size)
    args, train_args = parse_args(patient.flags("--train_mode", mode, "--learning_rate", rate))
    found = quick_findings(args, train_args, None, None, tiny.byte_level_tokenizer())
    assert ["LEARNING_RATE_UNUSUAL"] * unusual == [finding.code for finding in found]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_checkpoints_are_as_large_as_said(train, tiny_models, rows_file, tmp_path, mode):
    run = train("--train_mode", mode, "--save_strategy", "epoch", "--train_special_tokens", "off")
    args, train_args = parse_args(
        ["--model_name_or_path", tiny_models(), "--train_data_path", rows_file, "--train_mode", mode,
         "--output_dir", str(tmp_path / "other")]
    )  # fmt: skip
    one, finished = doctor_sizes.checkpoint_bytes(args, train_args, meta.model_size(args))
    (checkpoint, *_) = sorted(run.glob("checkpoint-*"))
    state = json.loads((run / "trainer_state.json").read_text())
    train_args.per_device_train_batch_size, train_args.num_train_epochs = 4, 2
    assert state["max_steps"] == steps_of(train_args, len(tiny.ROWS), 1)
    names = ("adapter_model.safetensors", "model.safetensors", "optimizer.pt")
    written = {path.name: path.stat().st_size for path in checkpoint.iterdir() if path.name in names}
    assert sum(written.values()) == pytest.approx(one, rel=0.15)  # names and figures of each tensor beside the numbers
    assert written["model.safetensors" if mode == "full" else "adapter_model.safetensors"] == pytest.approx(
        finished, rel=0.15
    )


@pytest.mark.parametrize(
    ("total", "host", "processes", "wanted"),
    [
        (5, 0, 1, []),
        (11, 0, 1, ["error about 11.0 GB are needed, and the machine has 10.0 GB"]),
        (9.5, 0, 1, ["warning about 9.5 GB are needed, and the machine has 10.0 GB"]),
        (4, 0, 2, []),
        (6, 0, 2, ["error about 6.0 GB are needed, and each of 2 processes has 5.0 GB"]),
        (1, 6, 2, ["error about 12.0 GB are needed, and the machine has 10.0 GB"]),
    ],
)
def test_memory_of_each_process_and_of_the_machine(monkeypatch, total, host, processes, wanted):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=10 * 10**9))
    estimate = SimpleNamespace(total=int(total * 1e9), host=int(host * 1e9))
    monkeypatch.setattr(doctor_sizes, "try_estimate", lambda *_: estimate)
    found = doctor_sizes.memory_findings(None, None, processes)
    assert [f"{finding.severity} {finding.message}" for finding in found] == wanted


def test_of_equal_rows_all_but_the_first_repeat(tmp_path):
    from utils.doctor.census import take_census
    from utils.doctor.rows import census_findings
    from utils.tasks import get_task

    said = ["a", "a", "b", "a", "c", "b"]
    file = write_rows(tmp_path / "rows.jsonl", [{"instruction": f"Say {text}.", "output": text} for text in said])
    (finding,) = census_findings(take_census(file, "--train_data_path", get_task("sft"), workers=1), None)
    assert finding.code == "DUPLICATE_ROWS" and finding.message.startswith("3 rows of 6 repeat an earlier one")
    assert f"{file}:2 repeats {file}:1; the most frequent appears 3 times" in finding.message
    assert finding.places[file].lines == [2, 4, 6]


@pytest.mark.parametrize(("lengths", "over"), [([3, 10], 0), ([3, 11], 1), ([11, 25], 2)])
def test_a_row_may_be_as_long_as_the_positions(lengths, over, monkeypatch):
    from datasets import Dataset

    from utils.doctor import settings as doctor_settings

    monkeypatch.setattr(doctor_settings, "model_size_or_none", lambda args: None)
    config = SimpleNamespace(max_position_embeddings=10, rope_parameters=None)
    config.get_text_config = lambda: config
    rows = Dataset.from_dict({"input_ids": [[1] * length for length in lengths]})
    data = SimpleNamespace(train=rows.with_format("arrow"), eval=None, eval_report=None)
    found = doctor_settings._positions(SimpleNamespace(task=get_task("sft")), config, data)
    wanted = f"{over} rows are longer than the model's 10 positions, the longest {max(lengths)} tokens"
    assert [finding.message[: len(wanted)] for finding in found] == [wanted] * (over > 0)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("modules", [None, "q_proj,down_proj"])
def test_trained_weights_are_as_many_as_pefts(dora, modules, tiny_models):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    args = SimpleNamespace(
        train_mode="lora", lora_rank=3, use_dora=dora, adapter_name_or_path=None, trust_remote_code=False,
        model_name_or_path=tiny_models("llama"), lora_target_modules=modules, lora_alpha=6, lora_dropout=0.0,
        use_rslora=False, task=get_task("sft"),
    )  # fmt: skip
    targets = modules.split(",") if modules else "all-linear"
    config = LoraConfig(task_type="CAUSAL_LM", r=3, use_dora=dora, target_modules=targets)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_models("llama")), config)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert meta.model_size(args).trained == trained


@pytest.mark.parametrize(
    ("optim", "only_model", "sizes"),
    [("adamw_torch", False, (12, 4)), ("adamw_torch", True, (4, 4)), ("sgd", False, (4, 4)),
     ("adamw_8bit", False, (6, 4))],
)  # fmt: skip
def test_bytes_of_a_weight_on_the_disk(optim, only_model, sizes):
    """In float32, beside AdamW's two numbers: float32 each, or one byte each."""
    args = SimpleNamespace(train_mode="full", precision="bf16")
    train_args = SimpleNamespace(deepspeed_plugin=None, optim=optim, save_only_model=only_model)
    shape = meta.ModelSize(1000, 1000, None, False)
    assert doctor_sizes.checkpoint_bytes(args, train_args, shape) == tuple(1000 * size for size in sizes)


def test_checkpoints_of_deepspeed():
    """As measured with DeepSpeed 0.19.8, ZeRO-2 in bf16: 16 bytes for each weight."""
    args = SimpleNamespace(train_mode="full", precision="bf16")
    shape = meta.ModelSize(1_000_000, 1_000_000, None, False)
    plain = SimpleNamespace(deepspeed_plugin=None, optim="adamw_torch_fused", save_only_model=False)
    deepspeed = SimpleNamespace(deepspeed_plugin=object(), optim="adamw_torch_fused", save_only_model=False)
    assert doctor_sizes.checkpoint_bytes(args, deepspeed, shape) == (16_000_000, 2_000_000)
    assert doctor_sizes.checkpoint_bytes(args, plain, shape) == (12_000_000, 4_000_000)


def test_deepspeed_keys_that_pass_the_arguments():
    config = SimpleNamespace(config={"tensorboard": {"enabled": True}, "activation_checkpointing": {}})
    messages = [finding.message for finding in deepspeed_keys(SimpleNamespace(hf_deepspeed_config=config))]
    assert len(messages) == 2
    assert "--report_to" in messages[0]
    assert "--gradient_checkpointing" in messages[1]
    assert deepspeed_keys(SimpleNamespace(hf_deepspeed_config=None)) == []


def test_the_quick_part_reads_the_first_rows_alone(tiny_models, rows_file, monkeypatch):
    """All rows would be read into memory, a million of them too; the settings are judged by how many there are."""
    args, train_args = parse_args(["--model_name_or_path", tiny_models(), "--train_data_path", rows_file])
    task, tokenizer = get_task(args.task_type), tokenizer_of(args)
    template = get_template(args.template_name, tokenizer)
    data = task.load_datasets(args, train_args, template, tokenizer)
    seen = {}
    monkeypatch.setattr(
        "utils.doctor.examine.token_findings", lambda dataset, *_: seen.update(tokens=len(dataset)) or []
    )
    monkeypatch.setattr(
        "utils.doctor.examine.settings_findings",
        lambda args, train_args, config, data, beginning, processes: (
            seen.update(rows=len(data.train), lengths=len(beginning.train)) or []
        ),
    )
    quick_findings(args, train_args, data, template, tokenizer, rows=2)
    assert seen == {"tokens": 2, "rows": len(data.train), "lengths": 2} and len(data.train) > 2
    quick_findings(args, train_args, data, template, tokenizer)
    assert seen["tokens"] == seen["lengths"] == len(data.train)


def test_a_prompt_whose_last_token_merges_with_the_answer_is_named():
    """As Qwen3.6: the prompt ends with `<think>\\n`, and in a row two line feeds are one token."""

    from utils.doctor.template import _prompt

    def render(messages, add_generation_prompt=False):
        return "Q<think>\n" if add_generation_prompt else f"Q<think>\n{after}</think>Hello!"

    template = SimpleNamespace(prompt_only_suffix=lambda: "", render=render)
    ids = {"Q": 1, "<think>": 2, "\n\n": 3, "\n": 4, "</think>": 5, "Hello!": 6}
    texts = {number: text for text, number in ids.items()}

    def tokenizer(text, **_):
        return {"input_ids": [ids[part] for part in re.findall("|".join(ids), text)]}

    tokenizer.decode = lambda numbers: "".join(map(texts.get, numbers))
    after = ""
    assert _prompt(template, tokenizer) == []
    after = "\n"
    (finding,) = _prompt(template, tokenizer)
    assert finding.code == "PROMPT_NOT_FOLLOWED" and r"another token in a row, '\n\n</think>'" in finding.message


def test_the_only_step_of_a_run_is_not_a_warm_up():

    from utils.doctor.settings import _warm_up

    arguments = SimpleNamespace(warmup_steps=0.03, get_warmup_steps=lambda steps: math.ceil(0.03 * steps))
    (finding,) = _warm_up(arguments, 1)
    assert "is 1 step of 1, and the first step of a warm-up has the learning rate 0" in finding.message
    assert _warm_up(arguments, 2) == _warm_up(arguments, 100) == []
