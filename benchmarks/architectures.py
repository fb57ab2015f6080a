"""Every causal language model of transformers that can be built small, trained and compared with plain transformers.

    python -m benchmarks.architectures                    # all, from the start
    python -m benchmarks.architectures --untried          # those not run yet, where a run was stopped
    python -m benchmarks.architectures --only gpt_oss     # some, once more
    python -m benchmarks.architectures --table            # only the pages, from the results at hand

benchmarks/architectures.json and .md, and the table in docs/models.md, are written after each model, the results of the
others kept. `architectures_models.py` has the models, `architectures_work.py` what is done with each of them, and
`architectures_table.py` the pages.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.architectures_models import ROOT
from benchmarks.architectures_table import is_right, write_pages
from benchmarks.architectures_work import examine

RESULTS = ROOT / "benchmarks" / "architectures.json"
SECONDS = 600  # for one model
UNTRIED = "not run yet"  # in results of a part of the architectures


def _child(kind: str, file: str) -> None:
    output = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(output, stream)
    Path(file).write_text(json.dumps(examine(kind)), encoding="utf-8")
    os._exit(0)  # without the exit handlers of what the parent imported


def examine_apart(kinds: list[str], jobs: int):
    """`examine` for each, in a process of its own, which a model may crash or hold up; yields lines as they come."""
    waiting, running = list(kinds), []
    with tempfile.TemporaryDirectory() as scratch:
        while waiting or running:
            while waiting and len(running) < jobs:
                kind = waiting.pop(0)
                file = Path(scratch) / f"{kind}.json"
                process = multiprocessing.get_context("fork").Process(target=_child, args=(kind, str(file)))
                process.start()
                running.append((kind, process, file, time.perf_counter()))
            time.sleep(0.1)
            for entry in list(running):
                kind, process, file, started = entry
                seconds = time.perf_counter() - started
                if process.is_alive() and seconds < SECONDS:
                    continue
                running.remove(entry)
                if process.is_alive():
                    process.kill()
                    found = {"not_built": f"took longer than {SECONDS} seconds"}
                elif file.is_file():
                    found = json.loads(file.read_text(encoding="utf-8"))
                else:
                    found = {"not_built": f"the process ended with code {process.exitcode}"}
                yield {"architecture": kind, **found, "seconds": round(seconds, 1)}


def results_so_far(kinds: list[str], keep: bool) -> dict:
    """The results to go on with: those at hand where they are kept, and every other architecture as not run yet.

    Raises:
        ValueError: The results at hand are of other versions of the libraries.
    """
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl", "peft")}
    models = {kind: {"architecture": kind, "not_built": UNTRIED} for kind in kinds}
    if keep and RESULTS.is_file():
        found = json.loads(RESULTS.read_text(encoding="utf-8"))
        if found["versions"] != versions:
            raise ValueError(f"{RESULTS.name} has results of {found['versions']}, here are {versions}; run all again")
        models.update({line["architecture"]: line for line in found["models"] if line["architecture"] in models})
    return {"versions": versions, "models": [models[kind] for kind in sorted(models)]}


def write(results: dict) -> None:
    """Writes the results, completely or not at all, and the pages made from them."""
    part = RESULTS.with_name(RESULTS.name + ".part")
    part.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    part.replace(RESULTS)
    write_pages(results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", nargs="+", default=[], help="names of architectures, as in config.json's model_type")
    which.add_argument("--untried", action="store_true", help="those that have no result yet")
    which.add_argument("--table", action="store_true", help="write the pages again, from the results at hand")
    parser.add_argument("--jobs", type=int, default=1, help="how many models at once")
    args = parser.parse_args()
    if args.table:
        write_pages(json.loads(RESULTS.read_text(encoding="utf-8")))
        return
    os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    import peft  # noqa: F401
    import torch
    import trl  # noqa: F401
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    import main_train  # noqa: F401  what every child would import

    torch.set_num_threads(1)
    every = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    unknown = sorted(set(args.only) - set(every))
    if unknown:
        parser.error(f"no causal language model of transformers: {', '.join(unknown)}")
    try:
        results = results_so_far(every, keep=args.untried or bool(args.only))
    except ValueError as error:
        parser.error(str(error))
    untried = [line["architecture"] for line in results["models"] if line.get("not_built") == UNTRIED]
    wanted = args.only or untried
    for count, line in enumerate(examine_apart(wanted, args.jobs), 1):
        print(f"{count}/{len(wanted)} {json.dumps(line)}", flush=True)
        results["models"] = [line if old["architecture"] == line["architecture"] else old for old in results["models"]]
        write(results)
    sys.exit(not all(map(is_right, results["models"])))


if __name__ == "__main__":
    main()
