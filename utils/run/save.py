"""A run's folder: opened and locked before the training, completed with weights, record and card after it."""

import contextlib
import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from loguru import logger

from utils.config.output_dir import check_output_dir
from utils.model.adapter import adapter_of
from utils.model.pissa import pissa_to_lora
from utils.run.card import CARD, card_text, changed_settings, is_own_card, write_card
from utils.run.plot import plot_history
from utils.run.record import data_record, effective_args, run_record, streamed_rows
from utils.run.samples import Sample, begin_samples, end_samples
from utils.run.summary import summarise
from utils.runtime.distributed import broadcast_object
from utils.runtime.errors import Problem, UserError, is_disk_error, raise_if_any
from utils.runtime.log import is_main_process, log_to_file, route_library_logs
from utils.storage.files import replace_file, write_json
from utils.storage.run_files import LEDGER_FILE, PISSA_START, clear_run, holds_weights, remove_pissa_start, written_here
from utils.storage.run_folder import (
    RECORD_FILE,
    RECORD_IN_PROGRESS,
    STATE,
    checkpoints_after,
    is_default_folder,
    new_folder,
    read_record,
    remove_checkpoint,
    remove_incomplete_checkpoints,
)
from utils.storage.run_lock import RUN_LOCK, acquire, release, run_lock_path
from utils.train.nonfinite import check_weights_finite
from utils.train.resume import resumed_from


def open_run_folder(args, train_args) -> Path:
    """Creates and locks the run's folder, and removes incomplete checkpoints from one that is resumed.

    Returns:
        the folder. Its train.log is opened later, by `begin_run`, with all messages so far.
    """
    route_library_logs()
    try:
        _claim_folder(train_args, bool(args.overwrite_output_dir or train_args.resume_from_checkpoint))
        folder = Path(train_args.output_dir)
        raise_if_any(broadcast_object(_lock_folder(args, train_args)))
        if is_main_process() and train_args.resume_from_checkpoint and args.overwrite_output_dir:
            for newer in checkpoints_after(train_args.resume_from_checkpoint, folder):
                remove_checkpoint(newer)
        if is_main_process() and train_args.resume_from_checkpoint:
            for name in remove_incomplete_checkpoints(folder):
                logger.warning("{} is incomplete and is removed", name)
    except OSError as error:
        raise UserError(f"--output_dir {train_args.output_dir!r} cannot be written: {error.strerror}") from error
    logger.debug("arguments: {}", json.dumps(effective_args(args, train_args), default=str))
    return folder


def _lock_folder(args, train_args) -> list[Problem]:
    """Locks the folder until this run ends, and checks it again, as another run may have written into it.

    Returns:
        the problems; none on other processes than the first.
    """
    if not is_main_process():
        return []
    try:
        acquire(run_lock_path(train_args.output_dir), f"--output_dir {train_args.output_dir!r}")
        return check_output_dir(args, train_args)
    except UserError as error:
        return error.problems


def _claim_folder(train_args, may_exist: bool) -> None:
    """Creates the folder; a default one, named by the time, must be new, so that two runs never share it."""
    folder = train_args.output_dir
    must_be_new = is_default_folder(folder) and not may_exist
    while is_main_process():
        try:
            Path(folder).mkdir(parents=True, exist_ok=not must_be_new)
            break
        except FileExistsError:
            if not must_be_new:
                raise
            folder = new_folder(train_args.output_dir)
            logger.info("another run started in the same second, so the folder of this one is {}", folder)
    train_args.output_dir = broadcast_object(folder)
    Path(train_args.output_dir).mkdir(parents=True, exist_ok=True)  # for processes on other machines


class RunStart(NamedTuple):
    """What `finish_run` needs from the time before the training.

    Attributes:
        record: the run's record without its summary; None on other processes than the first.
        samples: questions for the card, with the answers before the training.
        no_samples_reason: why the card has no samples; empty if it has some.
    """

    record: dict | None = None
    samples: Sequence[Sample] = ()
    no_samples_reason: str = ""


def begin_run(trainer, args, train_args, data, tokenizer) -> RunStart:
    """Writes the run's record and opens train.log before the training, so that a stopped run can be repeated too.

    With `--overwrite_output_dir` the files of a finished run are removed here: late, when all checks have passed, and
    before the first checkpoint, so that a crash cannot leave a mixture of both runs.

    Args:
        trainer, args, train_args, data, tokenizer: of the run.

    Raises:
        UserError: the folder cannot be written.
    """
    if not is_main_process():
        return RunStart()
    record = run_record(args, train_args, data)
    folder = Path(train_args.output_dir)
    if resumed := resumed_from(train_args, trainer.settings):
        record["resumed"] = [*((read_record(folder) or {}).get("resumed") or []), resumed]
    try:
        write_json(folder / RECORD_IN_PROGRESS, record)  # first, as it marks the folder as a run's
        if args.overwrite_output_dir and not train_args.resume_from_checkpoint:
            clear_run(folder, is_own_card(folder / CARD))
        (folder / RECORD_FILE).unlink(missing_ok=True)  # a finished run's record, also of a run that is resumed
        log_to_file(str(folder / "train.log"))
    except OSError as error:
        raise UserError(f"--output_dir {train_args.output_dir!r} cannot be written: {error.strerror}") from error
    return RunStart(record, *begin_samples(trainer, args, train_args, data, tokenizer))


@contextlib.contextmanager
def save_history_on_exit(trainer):
    """A context that writes and plots the trainer's history at its end, also if the training fails.

    Of a training that fails or is stopped, the row ledger is written as well, and the record has the streamed rows up
    to the last checkpoint.
    """
    ended = False
    try:
        with trainer.checkpoint_named_on_interrupt():
            yield
        ended = True
    finally:
        if is_main_process() and trainer.state.log_history:
            folder = Path(trainer.args.output_dir)
            try:
                with replace_file(folder / STATE) as part:
                    trainer.state.save_to_json(str(part))
                if not ended and getattr(trainer, "ledger", None) is not None:
                    trainer.ledger.write(folder / LEDGER_FILE)  # up to the last line of the log
                if not ended and getattr(trainer, "stream", None) is not None:
                    _update_streamed_rows(folder, trainer.stream.report)
                plot_history(trainer.state.log_history, folder / "loss.png", trainer.state.max_steps)
            except Exception as error:  # must not hide the error that ended the training
                logger.warning("the run's history cannot be written or plotted: {}: {}", type(error).__name__, error)
        if not ended:
            release(run_lock_path(trainer.args.output_dir))


def _update_streamed_rows(folder: Path, report) -> None:
    record = json.loads((folder / RECORD_IN_PROGRESS).read_text(encoding="utf-8"))
    record["data"]["train"] |= streamed_rows(report)
    write_json(folder / RECORD_IN_PROGRESS, record)


def finish_run(trainer, args, train_args, data, tokenizer, start: RunStart) -> dict:
    """Completes the run's folder: weights, tokenizer, trainer state, card, and last the record.

    Args:
        trainer, args, train_args, data, tokenizer: of the run.
        start: from `begin_run`.

    Returns:
        the summary: folder, rows, losses, next command; empty on other processes than the first.

    Raises:
        UserError: weights or record cannot be written.
    """
    folder = Path(trainer.args.output_dir)
    check_weights_finite(trainer)
    _save_weights_and_state(trainer, args, folder)
    if not is_main_process():
        return {}
    _refuse_without_weights(folder, args)
    record = start.record | {"data": data_record(data), "summary": summarise(trainer, args, data, folder)}
    try:
        # transformers saves its arguments as a pickle, which can run code when loaded; train_args.json has them too
        (folder / "training_args.bin").unlink(missing_ok=True)
        if adapter_of(args).is_adapter:
            trainer.model.generation_config.save_pretrained(folder)
        _save_card(trainer, args, train_args, tokenizer, start._replace(record=record), folder)
        write_json(folder / RECORD_IN_PROGRESS, record | {"files": written_here(folder)})
        os.replace(folder / RECORD_IN_PROGRESS, folder / RECORD_FILE)
    except OSError as error:
        raise UserError(
            f"the weights are in --output_dir {str(folder)!r}, but the run's record cannot be written beside them: "
            f"{error.strerror}. Free some space; infer and merge_lora can use the folder as it is"
        ) from error
    if trainer.args.push_to_hub:
        push_run(trainer, folder)
    release(run_lock_path(folder))
    return record["summary"]


def _save_weights_and_state(trainer, args, folder: Path) -> None:
    """Saves on all processes; a full disk becomes an error that names the command to continue with."""
    try:
        with trainer.checkpoint_named_on_interrupt():
            save_weights(trainer, args, folder)
            trainer.save_state()
    except Exception as error:
        if not is_disk_error(error):
            raise
        raise UserError(
            f"the weights cannot be written to --output_dir {str(folder)!r}: {error}. Free some space, then give the "
            f"same command with --output_dir {shlex.quote(str(folder))} --resume_from_checkpoint true"
        ) from error


def _refuse_without_weights(folder: Path, args) -> None:
    """Refuses a folder without weights: a backend that shards them may have saved only its own shards."""
    if not holds_weights(folder, adapter=adapter_of(args).is_adapter):
        raise UserError(
            f"the training ended, but no weights were saved in --output_dir {str(folder)!r}; its checkpoints hold the "
            "state to continue from. Have the backend gather the weights when it saves, and give the same command with "
            f"--output_dir {shlex.quote(str(folder))} --resume_from_checkpoint true"
        )


def _save_card(trainer, args, train_args, tokenizer, start: RunStart, folder: Path) -> None:
    """Writes the card; an error is logged and does not fail the run."""
    no_samples_reason = end_samples(trainer, tokenizer, start.samples) or start.no_samples_reason
    try:
        changed = changed_settings(args, train_args)
        samples = [] if no_samples_reason else start.samples
        history = trainer.state.log_history
        write_card(folder, card_text(start.record, history, changed, samples, no_samples_reason, str(folder)))
    except Exception as error:
        logger.warning("the run's card cannot be written: {}: {}", type(error).__name__, error)


def push_run(trainer, folder: Path) -> None:
    """Pushes the finished folder to the Hub; an error is logged and does not fail the run."""
    from huggingface_hub import upload_folder

    try:
        upload_folder(
            repo_id=trainer.hub_model_id,
            folder_path=folder,
            ignore_patterns=["checkpoint-*", "_*", "*.part", "*~", "training_args.bin", RUN_LOCK],
            delete_patterns=["*.part", "training_args.bin"],  # from checkpoints pushed during the training
            commit_message="The finished run",
            revision=trainer.args.hub_revision,
        )
    except Exception as error:  # the hub and the network each raise their own
        logger.error("{} is complete, but could not be pushed: {}: {}", folder, type(error).__name__, error)


def save_weights(trainer, args, folder: Path) -> None:
    """Saves model and tokenizer, a PiSSA adapter as a plain LoRA."""
    trainer.save_model(_internal_call=True)  # keeps transformers from pushing to the Hub, as more files follow
    if args.init_lora_weights == "pissa" and is_main_process():
        pissa_to_lora(folder, folder / PISSA_START / "adapter_model.safetensors")
        remove_pissa_start(folder)
