"""Proofs on the model itself: an adapter that can be taken off and merged, and answers that end."""

import dataclasses
import gc
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

from utils.data.bad_rows import BadRow
from utils.data.columns import with_columns
from utils.data.places import row_location
from utils.data.report import SHORTENED
from utils.export.merge import load_merged
from utils.infer.generate import GenerateArgs, generate_ids, prompt_ids
from utils.infer.load import Parts, TrainedArgs, load_trained
from utils.infer.prompts import to_prompt
from utils.model.adapter import adapter_of
from utils.model.merge_check import MergeDiffers
from utils.prove.figures import Count, DoesNotApply, Measure, ProofFailed, logits_of, same_logits
from utils.prove.subject import Subject, trained
from utils.run.save import save_weights
from utils.storage.files import write_json
from utils.storage.run_folder import RECORD_FILE
from utils.storage.weights import weights_size
from utils.template.tokenize import IGNORE_INDEX

MERGE_TOLERANCE = 1e-5  # (W + BA)x and Wx + B(Ax) are rounded differently in every layer, and the layers add up
STEPS, MAX_SECONDS = 200, 600  # the most that a model is trained to know rows by heart
MEMORISED_LOSS = 0.05  # nats a token: the right one is 95 % likely
_MAX_ROWS = 4  # rows that are memorised and then generated
_EXTRA_TOKENS = 16  # tokens that an answer may be longer than what was trained


def adapter_off(subject: Subject) -> list[Measure]:
    """The logits with the adapter switched off against the base's, from before there was an adapter."""
    _require_adapter(subject)
    if subject.args.init_lora_weights == "pissa":
        raise DoesNotApply("with a PiSSA adapter off the layers give (W0 - s B0 A0) x, not what the base gives")
    model = subject.trainer.model
    with model.disable_adapter():
        off = logits_of(model, subject.sequences())
    on = logits_of(model, subject.sequences())
    moved = same_logits("", subject.base_logits, on, 0.0).difference
    return [
        same_logits("largest logit, off", subject.base_logits, off, 0.0),
        # or it would be off only in that it never did anything
        Count("logits that the adapter moves", 1, int(moved > 0), int(moved <= 0), 0, "of 1"),
    ]


def merged(subject: Subject) -> list[Measure]:
    """The logits of the merged model, saved and loaded again, against those of base and adapter."""
    _require_adapter(subject)
    base = subject.args.model_name_or_path
    needed, free = 2 * weights_size(base, "float32"), shutil.disk_usage(subject.scratch).free
    if needed > free:
        raise DoesNotApply(
            f"merging needs {needed / 1e9:.1f} GB in {str(subject.scratch.parent)!r}, which has {free / 1e9:.1f} GB "
            "free; set TMPDIR to a folder on another disk"
        )
    trainer = subject.trainer
    folder = Path(trainer.args.output_dir)
    quantised = adapter_of(subject.args).quantised
    # a 4-bit base is another model than the one an adapter is merged into
    expected = None if quantised else logits_of(trainer.model, subject.sequences())
    save_weights(trainer, subject.args, folder)
    if subject.args.rope_scaling:  # which a run's folder has in its record
        write_json(folder / RECORD_FILE, {"common": {"rope_scaling": subject.args.rope_scaling}})
    args = TrainedArgs(model_path=str(folder), trust_remote_code=subject.args.trust_remote_code)
    parts = Parts(base, (str(folder),))
    with _moved_to_cpu(trainer.model, quantised):
        if expected is None:
            expected = _logits(load_trained(args, parts, "float32"), subject)
        whole = subject.scratch / "merged"
        try:
            load_merged(args, parts, "float32").model.save_pretrained(whole)
        except MergeDiffers as error:  # merging compares on tokens of its own, and refuses
            raise ProofFailed(str(error.problems[0])) from None
        model = load_trained(dataclasses.replace(args, model_path=str(whole)), Parts(str(whole), ()), "float32")
        found = _logits(model, subject)
        shutil.rmtree(whole)
    return [same_logits("largest logit", expected, found, MERGE_TOLERANCE)]


def _logits(model, subject: Subject) -> list:
    model.config._attn_implementation = subject.trainer.model.config._attn_implementation
    return logits_of(model, subject.sequences())


@contextmanager
def _moved_to_cpu(model, stays: bool):
    """Moves the model into the CPU's memory for a while; a quantised one cannot be moved, and is small."""
    import torch

    device = model.device
    if not stays:
        model.to("cpu")
    try:
        yield
    finally:
        gc.collect()
        torch.cuda.empty_cache()
        if not stays:
            model.to(device)


def stops(subject: Subject) -> list[Measure]:
    """Whether a model that was just taught a few rows ends its answers to them by the template's stop token."""
    if not subject.task.imitates:
        raise DoesNotApply("the loss of this task does not teach a format; prove it with the recipe that does")
    if subject.template is None:
        raise DoesNotApply("plain text has no answers")
    chosen = _rows_with_answer(subject)[:_MAX_ROWS]
    if not chosen:
        raise DoesNotApply("none of the rows has a question and, at its end, an answer that is trained whole")
    rows = [row for row, _ in chosen]
    subject.restore_initial_weights()
    loss, steps, seconds = _train_on(subject, rows)
    subject.trainer.model.eval()
    limits = [_trained(subject, row) + _EXTRA_TOKENS for row in rows]
    stopped = sum(_ends_with_stop(subject, raw, limit) for (_, raw), limit in zip(chosen, limits, strict=True))
    if stopped < len(rows) and loss > MEMORISED_LOSS and seconds >= MAX_SECONDS:
        raise DoesNotApply(
            f"{steps} steps in {seconds:.0f} s did not teach the model {len(rows)} rows (loss {loss:.2f}), so how it "
            "ends them says nothing"
        )
    known = "known by heart" if loss <= MEMORISED_LOSS else "not yet known by heart"
    what = f"answers that end within {max(limits)} tokens, after {steps} steps {known} (loss {loss:.3f})"
    return [Count(what, len(rows), stopped, len(rows) - stopped, 0, f"of {len(rows)}")]


def _rows_with_answer(subject: Subject) -> list[tuple[dict, dict]]:
    """Rows that end with an answer and were not shortened, as prepared and as they stand, the shortest first."""
    report = subject.data.report
    shortened = {(report.files.index(row.file), row.line) for row in report.records if row.kind == SHORTENED}
    found = []
    for row, raw in zip(subject.rows, subject.raw_rows, strict=True):
        try:
            answer = _prompt_of(subject, raw)[2]
        except BadRow:  # it has earlier answers, and no question at its end
            continue
        if answer and row_location(row) not in shortened:
            found.append((row, raw))
    return sorted(found, key=lambda pair: subject.task.row_type.length(pair[0]))


def _prompt_of(subject: Subject, raw: dict) -> tuple[list[dict], list | None, str | None]:
    return with_columns(to_prompt, subject.args.column_names)(raw)


def _trained(subject: Subject, row: dict) -> int:
    """How many tokens of a row are trained."""
    return sum(label != IGNORE_INDEX for part in subject.task.row_type.sequences(row) for label in part.labels)


def _ends_with_stop(subject: Subject, raw: dict, limit: int) -> bool:
    """Whether an answer to a row's question, not an empty one, ends by the stop token within `limit` tokens."""
    model, tokenizer = subject.trainer.model, subject.tokenizer
    messages, tools, _ = _prompt_of(subject, raw)
    prompt = prompt_ids(model, tokenizer, messages, tools, subject.args.allow_special_tokens_in_content)
    (answer,) = generate_ids(model, tokenizer, [prompt], GenerateArgs(max_new_tokens=limit), [0])
    return tokenizer.eos_token_id in answer[1:]


def _train_on(subject: Subject, rows: list[dict]) -> tuple[float, int, float]:
    """Trains on all the rows in every step until they are known by heart; returns loss, steps and seconds."""
    import torch
    from tqdm import tqdm

    batch = subject.collator(subject.task.lays_end_to_end(subject.train_args))(rows)
    weights = list(trained(subject.trainer.model).values())
    width = subject.trainer.model.config.get_text_config().hidden_size
    # a rate that suits the width, as the recipe's comments have it: 2e-3 at 256, 1e-4 at 4,096 under LoRA
    optimizer = torch.optim.AdamW(weights, lr=(0.5 if subject.has_adapter else 0.2) / width, weight_decay=0.0)
    started, loss, steps = time.monotonic(), float("inf"), 0
    with tqdm(total=STEPS, desc="learning a few rows", leave=False) as bar:
        while loss > MEMORISED_LOSS and steps < STEPS and time.monotonic() - started < MAX_SECONDS:
            loss = subject.step([dict(batch)]).loss
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            steps += 1
            bar.set_postfix(loss=f"{loss:.3f}")
            bar.update()
    return loss, steps, time.monotonic() - started


def _require_adapter(subject: Subject) -> None:
    if not subject.has_adapter:
        raise DoesNotApply(f"--train_mode {subject.args.train_mode} has no adapter")
