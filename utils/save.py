"""What a run leaves behind, and the summary it ends with."""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

from loguru import logger

from utils.card import CARD, card_text, changed_settings, is_own_card, write_card
from utils.check_run import FINISHED
from utils.checkpoints import checkpoints_of, newer_than, remove_torsos
from utils.errors import UserError, is_about_the_disk
from utils.log import is_main_process, log_to_file, route_library_logs
from utils.plot import plot_history
from utils.record import BEGUN, effective_args, run_record, write_record
from utils.samples import begin_samples, end_samples
from utils.summary import summarise
from utils.tokenizer import set_format
from utils.trainer import refuse_broken_weights

STATE = "trainer_state.json"
_PISSA_START = "pissa_start"
_WEIGHTS = r"model(-\d{5}-of-\d{5})?\.safetensors"


def open_run(train_args, args) -> Path:
    """Makes the run's folder, once nothing more can be refused, and opens its log.

    With `--overwrite_output_dir` the marks of the finished run go, so that a crash does not
    leave the old run's figures beside the new one's checkpoints.
    """
    folder = Path(train_args.output_dir)
    route_library_logs()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if is_main_process():
            (folder / FINISHED).unlink(missing_ok=True)  # until this run is finished, too
        if is_main_process() and args.overwrite_output_dir and not train_args.resume_from_checkpoint:
            _clear_finished(folder)
        if is_main_process() and train_args.resume_from_checkpoint and args.overwrite_output_dir:
            for newer in newer_than(train_args.resume_from_checkpoint, folder):
                shutil.rmtree(newer)
        if is_main_process() and train_args.resume_from_checkpoint:
            for name in remove_torsos(folder):
                logger.warning("{} was not written to its end and is removed", name)
        log_to_file(str(folder / "train.log"))
    except OSError as error:
        raise UserError(f"--output_dir {str(folder)!r} cannot be written: {error.strerror}") from error
    logger.debug("arguments: {}", json.dumps(effective_args(args, train_args), default=str))
    return folder


def _clear_finished(folder: Path) -> None:
    """Removes what an earlier run of this project left, and nothing else."""
    names = [
        FINISHED,
        BEGUN,
        STATE,
        "train.log",
        "loss.png",
        "adapter_model.safetensors",
        "model.safetensors.index.json",
    ]
    shards = [path.name for path in folder.glob("*") if re.fullmatch(_WEIGHTS, path.name)]
    names += [CARD] if is_own_card(folder / CARD) else []
    for name in names + shards:
        (folder / name).unlink(missing_ok=True)
    for old in checkpoints_of(folder):
        shutil.rmtree(old)


def prepare_trainer(trainer, tokenizer, template, args) -> None:
    """Makes every checkpoint, not only the last, speak and stop as trained."""
    from utils.callbacks import FindBest, MetricsToLog, StopEarly, StopOnSignal

    trainer.add_callback(MetricsToLog())
    trainer.add_callback(FindBest())
    if args.early_stopping_patience:
        trainer.add_callback(StopEarly(args.early_stopping_patience, args.early_stopping_threshold))
    trainer.add_callback(StopOnSignal())
    # TRL writes a model card into the run's folder with every checkpoint, over one that may lie there
    trainer.create_model_card = lambda *args, **kwargs: None
    model = trainer.model
    if template is not None:
        set_format(tokenizer, template, model)
    if args.init_lora_weights == "pissa" and is_main_process():
        # PiSSA takes weight out of the base; the start is needed to say the end as a plain LoRA
        model.save_pretrained(Path(trainer.args.output_dir) / _PISSA_START)


def note_start(trainer, args, train_args, data, tokenizer) -> dict:
    """Notes what is trained with what, before it is: a run that is stopped can be repeated and compared as well.

    Returns:
        the record, and the questions for the card with the answers before the training; empty on other processes.
    """
    if not is_main_process():
        return {}
    record = run_record(args, train_args, data)
    try:
        write_record(record, Path(train_args.output_dir) / BEGUN)
    except OSError as error:
        raise UserError(f"--output_dir {train_args.output_dir!r} cannot be written: {error.strerror}") from error
    samples, why_none = begin_samples(trainer, args, train_args, data, tokenizer)
    return {"record": record, "samples": samples, "why_none": why_none}


@contextlib.contextmanager
def keep_figures(trainer):
    """Writes the history and draws it however the training ends, and never hides how that was."""
    try:
        yield
    finally:
        if is_main_process() and trainer.state.log_history:
            folder = Path(trainer.args.output_dir)
            try:
                trainer.state.save_to_json(str(folder / (STATE + ".part")))
                os.replace(folder / (STATE + ".part"), folder / STATE)
                plot_history(trainer.state.log_history, folder / "loss.png", trainer.state.max_steps)
            except Exception as error:
                with contextlib.suppress(OSError):
                    (folder / (STATE + ".part")).unlink(missing_ok=True)
                logger.warning("the run's figures cannot be written or drawn: {}: {}", type(error).__name__, error)


def end_if_stopped(trainer) -> None:
    """Ends the command here if a signal stopped the training, with what to type to go on."""
    for callback in trainer.callback_handler.callbacks:
        if hasattr(callback, "raise_if_stopped"):
            callback.raise_if_stopped(trainer.state, trainer.args.output_dir)


def finish_run(trainer, args, train_args, data, tokenizer, start) -> dict:
    """Writes the run's folder: weights, tokenizer, arguments, state, card.

    Args:
        trainer, args, train_args, data, tokenizer: of the run.
        start: from `note_start`.

    Returns:
        the summary: folder, rows, losses, next command.
    """
    folder = Path(trainer.args.output_dir)
    refuse_broken_weights(trainer)
    try:
        _save_weights(trainer, args, folder)
        trainer.save_state()
    except Exception as error:
        if not is_about_the_disk(error):
            raise
        raise UserError(
            f"the weights cannot be written to --output_dir {str(folder)!r}: {error}. Make room, then give the same "
            f"command with --output_dir {folder} --resume_from_checkpoint true"
        ) from error
    if not is_main_process():
        return {}
    # pickled, and said again in readable form by train_args.json
    (folder / "training_args.bin").unlink(missing_ok=True)
    if args.train_mode != "full":
        trainer.model.generation_config.save_pretrained(folder)
    record = start["record"] | {"summary": summarise(trainer, args, data, folder)}
    _save_card(trainer, args, train_args, tokenizer, start | {"record": record}, folder)
    write_record(record, folder / BEGUN)
    os.replace(folder / BEGUN, folder / FINISHED)
    if trainer.args.push_to_hub:
        push_card(trainer, folder)
    return record["summary"]


def _save_card(trainer, args, train_args, tokenizer, start: dict, folder: Path) -> None:
    """A card that cannot be written does not cost the run."""
    samples = start["samples"]
    why_none = end_samples(trainer, tokenizer, samples) or start["why_none"]
    try:
        changed = changed_settings(args, train_args)
        shown = [] if why_none else samples
        write_card(folder, card_text(start["record"], trainer.state.log_history, changed, shown, why_none, str(folder)))
    except Exception as error:
        logger.warning("the run's card cannot be written: {}: {}", type(error).__name__, error)


def push_card(trainer, folder: Path) -> None:
    """Adds what the trainer's own push, which comes with the weights, was too early for."""
    from huggingface_hub import upload_folder

    try:
        upload_folder(
            repo_id=trainer.hub_model_id,
            folder_path=folder,
            allow_patterns=[CARD, FINISHED, "loss.png"],
            commit_message="The run's card",
            token=trainer.args.hub_token,
            revision=trainer.args.hub_revision,
        )
    except Exception as error:  # the hub and the network each raise their own
        logger.warning("the run's card could not be pushed: {}: {}", type(error).__name__, error)


def _save_weights(trainer, args, folder: Path) -> None:
    card = folder / "README.md"
    own_card = card.read_bytes() if card.is_file() else None
    trainer.save_model()
    if is_main_process() and card.is_file():
        # PEFT's model card is a form to fill in; one that was there before stays
        card.write_bytes(own_card) if own_card is not None else card.unlink()
    if args.init_lora_weights == "pissa" and is_main_process():
        pissa_to_lora(folder, folder / _PISSA_START)
        shutil.rmtree(folder / _PISSA_START)


def pissa_to_lora(folder: Path, start: Path) -> None:
    """Rewrites a PiSSA adapter as a plain LoRA on the unchanged base, of twice the rank.

    PiSSA trains W = (W0 - B0 A0) + B A, so against W0 (arXiv 2404.02948, appendix C)

        W - W0 = B A - B0 A0 = [B | -B0] [A ; A0]

    PEFT's own conversion loses trained token rows, which stand beside A and B.

    Args:
        folder: holds the trained adapter, and the new one afterwards.
        start: holds the adapter as it was before training.
    """
    import torch
    from safetensors.torch import load_file, save_file

    weights, before = (load_file(path / "adapter_model.safetensors") for path in (folder, start))
    for name, weight in weights.items():
        if "lora_A" in name:
            weights[name] = torch.cat([weight, before[name]], dim=0)
        elif "lora_B" in name:
            weights[name] = torch.cat([weight, -before[name]], dim=1)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    # the scale stays: alpha / r, or alpha / sqrt(r) when rank-stabilised
    config["lora_alpha"] *= 2**0.5 if config["use_rslora"] else 2
    config["r"] *= 2
    config["init_lora_weights"] = True
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
