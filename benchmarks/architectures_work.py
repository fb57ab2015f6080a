"""Trains one architecture in full and with LoRA, and compares every step with plain transformers and PEFT.

Each model is random, of its own class, in float32, and trained by `main_train.py` with default settings but for sizes.
"""

import contextlib
import json
import shutil
import tempfile
import traceback
from pathlib import Path
from unittest import mock

from benchmarks.architectures_models import ROWS, prepare

# relative differences; other shapes of the same sums in float32 make some 1e-6
LOSS_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3  # of all gradients' norm
LOGITS_TOLERANCE = 1e-5  # of the largest logit: the same shapes, so saved weights that are equal give equal logits
MERGE_TOLERANCE = 1e-4  # of the largest logit
NEW_TOKENS = 8
MODES = {"full": ["--train_mode", "full"], "lora": []}


@contextlib.contextmanager
def plain_attention():
    """Uses transformers' own SDPA attention, which a run replaces for the whole process."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    replaced = AttentionInterface()["sdpa"]
    AttentionInterface.register("sdpa", sdpa_attention_forward)
    try:
        yield
    finally:
        AttentionInterface.register("sdpa", replaced)


def load(base: Path, run: Path | None = None, trainable: bool = False):
    """The model as plain transformers and PEFT load it, in float32, in evaluation mode."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = run is not None and (run / "adapter_config.json").is_file()
    model = AutoModelForCausalLM.from_pretrained(base if adapter or run is None else run, dtype=torch.float32)
    return (PeftModel.from_pretrained(model, run, is_trainable=trainable) if adapter else model).eval()


def row_loss(model, row: dict):
    """The summed cross-entropy of a row's labelled tokens, from the model's own logits."""
    import torch

    labels = torch.tensor(row["labels"])[1:]
    logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")


def labelled(rows: list[dict]) -> int:
    """The number of tokens that are trained."""
    return sum(label != -100 for row in rows for label in row["labels"][1:])


def plain_loss(model, rows: list[dict]) -> float:
    """Mean cross-entropy over the trained tokens, one row at a time."""
    import torch

    with torch.no_grad():
        return sum(float(row_loss(model, row)) for row in rows) / labelled(rows)


def plain_gradients(model, rows: list[dict]) -> dict:
    """The gradient of `plain_loss` in training mode, by the weight's name."""
    model.train()
    for row in rows:
        (row_loss(model, row) / labelled(rows)).backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def gradient_difference(ours: dict, plain: dict) -> float:
    """The norm of the difference by the norm of all gradients; infinity if a weight has no gradient in one of them."""
    # a gradient of zeros and none at all train a weight alike
    names = {name for found in (ours, plain) for name, gradient in found.items() if bool(gradient.any())}
    if not names <= ours.keys() & plain.keys():
        return float("inf")
    squares = [((ours[name] - plain[name]).square().sum(), plain[name].square().sum()) for name in names]
    return float((sum(square for square, _ in squares) / sum(square for _, square in squares)).sqrt())


def logits_of(model, rows: list[dict]) -> list:
    """The logits of each row alone, in evaluation mode."""
    import torch

    model.eval()
    with torch.no_grad():
        ids = [torch.tensor([row["input_ids"]]) for row in rows]
        return [model(input_ids=row, use_cache=False).logits[0].float() for row in ids]


def logits_difference(ours: list, plain: list) -> float:
    """The largest difference, relative to the largest logit."""
    largest = max(float(logits.abs().max()) for logits in plain)
    return max(float((found - logits).abs().max()) for found, logits in zip(ours, plain, strict=True)) / largest


def prompts_of(rows: list[dict]) -> list[list[int]]:
    """The tokens up to the first answer, of two rows of different length."""
    prompts = [row["input_ids"][: next(at for at, label in enumerate(row["labels"]) if label != -100)] for row in rows]
    return [min(prompts, key=len), max(prompts, key=len)]


def greedy(model, prompts: list[list[int]], tokenizer) -> list[str]:
    """What transformers' own `generate` answers to each prompt alone."""
    import torch
    from transformers import GenerationConfig

    from utils.infer.generate import text_of

    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, **ends)
    for part in (model, model.get_base_model()) if hasattr(model, "peft_config") else (model,):
        part.generation_config = config  # generate takes what a call leaves out from the model's own
    model.eval()
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
        answers.append(text_of(tokenizer, output[0, len(prompt) :].tolist()))
    return answers


def inferred(run: Path, prompts: list[list[int]]) -> list[str]:
    """What infer answers to all prompts at once, padded to one length where it does so."""
    from utils.infer.generate import answer_all
    from utils.infer.load import load_for_inference
    from utils.script.infer import parse

    args, parts = parse(["--model_path", str(run), "--dtype", "float32", "--max_new_tokens", str(NEW_TOKENS)])
    model, tokenizer = load_for_inference(args, parts, args.dtype)
    answers = dict(answer_all(model, tokenizer, prompts, args, batch_size=len(prompts)))
    return [answers[place] for place in range(len(prompts))]


class Watched:
    """What a run holds in memory: the gradients of its first step, and its trained model.

    Attributes:
        start: the folder that a new adapter is saved in before the first step.
        gradients: by the weight's name; of the layout that the run chose.
        padded_loss: of the base, as evaluation computes it on padded rows.
        logits: of each row, from the trained model.
        answers: `greedy` of the trained model; the error of a model that transformers cannot generate with.
    """

    def __init__(self, rows: list[dict], start: Path):
        self.rows, self.start, self.gradients = rows, start, {}

    @contextlib.contextmanager
    def watching(self):
        """Has the next run of `main_train.main` noted here."""
        from utils.run import save

        begin, finish = save.begin_run, save.finish_run

        def begin_run(trainer, *given):
            if hasattr(trainer.model, "peft_config"):
                trainer.model.save_pretrained(self.start)
            self.padded_loss = padded_loss(trainer)
            trainer.add_callback(self._noting_gradients())
            return begin(trainer, *given)

        def finish_run(trainer, *given):
            summary = finish(trainer, *given)
            self._note(trainer)
            return summary

        with mock.patch.object(save, "begin_run", begin_run), mock.patch.object(save, "finish_run", finish_run):
            yield self

    def _noting_gradients(self):
        from transformers import TrainerCallback

        class Callback(TrainerCallback):
            def on_pre_optimizer_step(_, args, state, control, model=None, **kwargs):
                if not self.gradients:
                    weights = model.named_parameters()
                    self.gradients = {name: w.grad.clone() for name, w in weights if w.grad is not None}

        return Callback()

    def _note(self, trainer) -> None:
        self.logits = logits_of(trainer.model, self.rows)
        self.answers = attempted(greedy, trainer.model, prompts_of(self.rows), trainer.processing_class)


def padded_loss(trainer) -> float:
    """The evaluation loss on padded rows, whatever layout the run trains in."""
    from utils.data.collate import build_collator

    collator = build_collator(trainer.processing_class.pad_token_id, padding_free=False)
    with mock.patch.object(trainer, "data_collator", collator):
        return trainer.evaluate()["eval_loss"]


def attempted(function, *given):
    """What a function returns, or its error: each model's code raises its own."""
    try:
        return function(*given)
    except Exception as error:
        return error


def train(mode: str, base: Path, folder: Path, rows: list[dict]) -> dict:
    """Trains two steps; returns what was found."""
    import main_train
    from utils.runtime.errors import UserError

    file, run = folder / "rows.jsonl", folder / mode
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    flags = [
        "--model_name_or_path", str(base), "--train_data_path", str(file), "--eval_data_path", str(file),
        "--output_dir", str(run), "--cache_dir", str(folder / "cache"), "--precision", "fp32", "--max_steps", "2",
        "--per_device_train_batch_size", str(len(ROWS)), "--eval_strategy", "steps", "--eval_steps", "2",
        "--logging_steps", "1", "--warmup_steps", "0", "--learning_rate", "1e-3", "--save_strategy", "no",
        "--report_to", "none", "--disable_tqdm", "true", "--card_samples", "0", "--router_aux_loss_coef", "0",
        "--load_best_model_at_end", "false", "--max_grad_norm", "0", *MODES[mode],
    ]  # fmt: skip
    try:
        with Watched(rows, folder / "start").watching() as watched:
            main_train.main(flags)
    except UserError as error:
        return {"refused": reason(error, base, run)}
    return compare(mode, watched, base, run, rows)


def compare(mode: str, watched: Watched, base: Path, run: Path, rows: list[dict]) -> dict:
    """Compares a finished run with plain transformers and PEFT, which load its base and what it has saved."""
    history = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    settings = json.loads((run / "train_args.json").read_text(encoding="utf-8"))["trainer"]
    found = {
        "layout": "end to end" if settings["padding_free"] else "padded",
        "loss": next(entry["loss"] for entry in history if "loss" in entry),
        "eval_loss": next(entry["eval_loss"] for entry in history if "eval_loss" in entry),
        "padded_loss": watched.padded_loss,
    }
    with plain_attention():
        plain, reloaded = load(base), load(base, run)
        found |= {"plain_loss": plain_loss(plain, rows), "plain_eval_loss": plain_loss(reloaded, rows)}
        start = load(base, watched.start if mode == "lora" else None, trainable=True)
        found["gradient"] = gradient_difference(watched.gradients, plain_gradients(start, rows))
        logits = logits_of(reloaded, rows)
        found["moved"] = logits_difference(logits_of(plain, rows), logits)
        found["reloaded"] = logits_difference(watched.logits, logits)
        if mode == "lora":
            found["merged"] = merged(base, run, run.with_name("merged"), rows, logits)
        found["generates"] = compare_answers(watched.answers, reloaded, run, rows)
    found["problems"] = problems_of(found)
    return found


def reason(error, base: Path, run: Path) -> str:
    """Why something is refused, in one line without the paths."""
    return str(error.problems[0]).replace(repr(str(base)), "the base").replace(repr(str(run)), "of the run")


def merged(base: Path, run: Path, folder: Path, rows: list[dict], logits: list) -> float | str:
    """The difference of the merged model's logits, loaded by plain transformers, from the adapter's; or the refusal."""
    from utils.runtime.errors import UserError
    from utils.script.merge_lora import main as merge_lora

    try:
        merge_lora(["--model_path", str(run), "--output_dir", str(folder)])
    except UserError as error:
        return reason(error, base, run)
    return logits_difference(logits_of(load(folder), rows), logits)


def compare_answers(in_memory, reloaded, run: Path, rows: list[dict]) -> dict:
    """Whether the trained model, the reloaded one and infer give the same answers; else all of them, or the error."""
    from transformers import AutoTokenizer

    from utils.runtime.errors import UserError

    tokenizer, prompts = AutoTokenizer.from_pretrained(run), prompts_of(rows)
    plain = attempted(greedy, reloaded, prompts, tokenizer)
    given = {"memory": in_memory, "infer": attempted(inferred, run, prompts)}
    if isinstance(plain, Exception):
        refused = isinstance(given["infer"], UserError)
        return {"not_possible": one_line(plain), **({} if refused else {"plain": None, "infer": repr(given["infer"])})}
    different = {
        name: one_line(answers) if isinstance(answers, Exception) else answers
        for name, answers in given.items()
        if answers != plain
    }
    return {"plain": plain, **different} if different else {}


def problems_of(found: dict) -> list[str]:
    """What is not as in plain transformers, in words."""
    problems = []
    for name, plain, what in (
        ("loss", "plain_loss", "the first step's loss"),
        ("eval_loss", "plain_eval_loss", "the evaluation loss of the saved weights"),
        ("padded_loss", "plain_loss", "the base's loss on padded rows"),
    ):
        if not abs(found[name] - found[plain]) <= LOSS_TOLERANCE * abs(found[plain]):
            problems.append(f"{what} is {found[name]:.6f}, in plain transformers {found[plain]:.6f}")
    for name, tolerance, what in (
        ("gradient", GRADIENT_TOLERANCE, "the gradients of the first step differ from those of plain transformers"),
        ("reloaded", LOGITS_TOLERANCE, "the logits of the reloaded model differ from those of the trained one"),
        ("merged", MERGE_TOLERANCE, "the logits of the merged model differ from the adapter's"),
    ):
        difference = found.get(name, 0.0)
        if not isinstance(difference, str) and not difference <= tolerance:
            problems.append(f"{what} by {difference:.2g}")
    if not found["moved"] > 100 * LOGITS_TOLERANCE:
        problems.append(f"the training has changed the logits by {found['moved']:.2g} only")
    generates = found["generates"]
    for name in ("memory", "infer"):
        if name in generates:
            problems.append(f"{name} answers {generates[name]!r}, plain transformers {generates['plain']!r}")
    return problems


def one_line(error: BaseException) -> str:
    """`KeyError: 'dim'`; the validators of a configuration give the reason in their second line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def examine(kind: str) -> dict:
    """All of one architecture, in this process."""
    folder = Path(tempfile.mkdtemp(prefix="dojo-architecture-"))
    try:
        try:
            base, rows = prepare(kind, folder)
            load(base)
        except Exception as error:  # configurations and models raise their own
            return {"not_built": one_line(error)}
        found = {}
        for mode in MODES:
            try:
                found[mode] = train(mode, base, folder, rows)
            except BaseException as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                found[mode] = {"crashed": f"{one_line(error)} ({Path(where.filename).name}:{where.lineno})"}
        return found
    finally:
        shutil.rmtree(folder, ignore_errors=True)
