"""What a run leaves behind, and the summary it ends with."""

import dataclasses
import importlib.metadata
import json
import os
import re
import shutil
from pathlib import Path

from loguru import logger

from utils.check_run import FINISHED
from utils.checkpoints import checkpoints_of, newer_than, remove_torsos
from utils.errors import UserError, is_about_the_disk
from utils.evaluation import evaluation_lines, evaluation_summary
from utils.log import is_main_process, log_to_file, route_library_logs
from utils.plot import plot_history
from utils.tokenizer import set_format
from utils.trainer import refuse_broken_weights
from utils.weight_files import fingerprint

STATE = "trainer_state.json"
_PISSA_START = "pissa_start"
_WEIGHTS = r"model(-\d{5}-of-\d{5})?\.safetensors"
LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")


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
    names = [FINISHED, STATE, "train.log", "loss.png", "adapter_model.safetensors", "model.safetensors.index.json"]
    shards = [path.name for path in folder.glob("*") if re.fullmatch(_WEIGHTS, path.name)]
    for name in names + shards:
        (folder / name).unlink(missing_ok=True)
    for old in checkpoints_of(folder):
        shutil.rmtree(old)


def effective_args(args, train_args) -> dict:
    """Every value the run used, by dataclass; no token, nothing from the environment."""
    trainer = {name: value for name, value in train_args.to_dict().items() if "token" not in name or "tokens" in name}
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"common": dataclasses.asdict(args), "trainer": trainer, "versions": versions}


def prepare_trainer(trainer, tokenizer, template, args) -> None:
    """Makes every checkpoint, not only the last, speak and stop as trained."""
    from utils.callbacks import FindBest, MetricsToLog, StopEarly, StopOnSignal

    trainer.add_callback(MetricsToLog())
    trainer.add_callback(FindBest())
    if args.early_stopping_patience:
        trainer.add_callback(StopEarly(args.early_stopping_patience, args.early_stopping_threshold))
    trainer.add_callback(StopOnSignal())
    if not trainer.args.push_to_hub:
        # TRL writes a model card into the run's folder with every checkpoint, over one that may lie there
        trainer.create_model_card = lambda *args, **kwargs: None
    model = trainer.model
    if template is not None:
        set_format(tokenizer, template, model)
    if args.init_lora_weights == "pissa" and is_main_process():
        # PiSSA takes weight out of the base; the start is needed to say the end as a plain LoRA
        model.save_pretrained(Path(trainer.args.output_dir) / _PISSA_START)


def end_if_stopped(trainer) -> None:
    """Ends the command here if a signal stopped the training, with what to type to go on."""
    for callback in trainer.callback_handler.callbacks:
        if hasattr(callback, "raise_if_stopped"):
            callback.raise_if_stopped(trainer.state, trainer.args.output_dir)


def finish_run(trainer, args, train_args, data, tokenizer, template) -> dict:
    """Writes the run's folder: weights, tokenizer, arguments, state, plot.

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
    plot_history(trainer.state.log_history, folder / "loss.png")
    summary = summarise(trainer, args, data, folder)
    # an adapter fits these weights and no others of their shape
    base = {"path": args.model_name_or_path, "fingerprint": fingerprint(args.model_name_or_path)}
    text = json.dumps(
        effective_args(args, train_args) | {"base": base, "summary": summary}, indent=2, ensure_ascii=False, default=str
    )
    temporary = folder / (FINISHED + ".part")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, folder / FINISHED)
    return summary


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


def summarise(trainer, args, data, folder: Path) -> dict:
    """The figures a run ends with."""
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return {
        "folder": str(folder),
        "rows_trained": data.rows_trained(),
        "rows_dropped": data.report.dropped_rows(),
        "steps": trainer.state.global_step,
        "steps_skipped": trainer.steps_skipped,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        **evaluation_summary(trainer),
        "next": f"python -m utils.script.infer --model_path {folder}",
    }


def print_summary(summary: dict) -> None:
    """Prints the summary, on the first process only."""
    if not summary:
        return

    def figure(value):
        return "not measured" if value is None else f"{value:.4f}"

    skipped = f", {summary['steps_skipped']:,} of them left out (--on_nan skip)" if summary["steps_skipped"] else ""
    logger.info(
        "\nfinished: {folder}\n"
        "  rows trained     {rows_trained:,}, dropped {rows_dropped:,}\n"
        "  steps            {steps:,}{skipped}\n"
        "  loss             {first} at first, {last} at last\n"
        "{evaluation}"
        "talk to it:\n  {next}",
        first=figure(summary["first_loss"]),
        last=figure(summary["last_loss"]),
        evaluation=evaluation_lines(summary),
        skipped=skipped,
        **summary,
    )
