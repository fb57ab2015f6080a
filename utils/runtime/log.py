"""Logging to the terminal and to `train.log`, by the main process only."""

import logging
import os
import sys
import warnings

from loguru import logger

_FORMAT = "{time:YYYY-MM-DD HH:mm:ss} | {level: <7} | {message}"
_early_lines: list[str] = []
_early_sink: int | None = None


def is_main_process() -> bool:
    """True in a plain run and in the first rank of a launcher's run."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0


class _ToLoguru(logging.Handler):
    """Passes on the libraries' messages to loguru, to the file rather than to the terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "WARNING" if record.levelno >= logging.ERROR else "DEBUG"
        logger.log(level, "{}: {}", record.name, record.getMessage())


def setup_logging() -> None:
    """Logs to the terminal from INFO on, and keeps all lines for the run's log file.

    The run's folder is created only after all checks; `log_to_file` then writes the lines kept until then.
    """
    global _early_sink
    from tqdm import tqdm

    logger.remove()
    _early_lines.clear()
    if not is_main_process():
        _be_silent()
        return
    # tqdm.write does not break a progress bar
    logger.add(lambda line: tqdm.write(line, end="", file=sys.stderr), level="INFO", format="{message}")
    _early_sink = logger.add(_early_lines.append, level="DEBUG", format=_FORMAT)
    route_library_logs()


def _be_silent() -> None:
    """Silences a process that is not the main one, except for tracebacks."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    os.environ["TQDM_DISABLE"] = "1"  # transformers' and datasets' bars
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (DeepSpeed prints; open to the end)


def route_library_logs() -> None:
    """Routes the libraries' messages to loguru; to be called again after their import, which sets up handlers."""
    if not is_main_process():
        return
    warnings.simplefilter("default")
    logging.captureWarnings(True)
    for name in (
        "transformers",
        "trl",
        "peft",
        "datasets",
        "accelerate",
        "bitsandbytes",
        "DeepSpeed",
        "py.warnings",
        "torch",
    ):
        library = logging.getLogger(name)
        library.handlers = [_ToLoguru()]
        library.propagate = False


def log_to_file(path: str) -> None:
    """Opens `path` as the run's log file and writes the lines logged so far."""
    if not is_main_process():
        return
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(_early_lines)
    logger.remove(_early_sink)
    _early_lines.clear()
    logger.add(path, level="DEBUG", format=_FORMAT, encoding="utf-8")
