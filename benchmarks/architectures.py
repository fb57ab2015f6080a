"""Every causal language model of transformers that can be built small, trained and compared with plain transformers.

    python -m benchmarks.architectures                    # all, from the start
    python -m benchmarks.architectures --untried          # those not run yet, where a run was stopped
    python -m benchmarks.architectures --only gpt_oss     # some, once more

benchmarks/architectures.json and .md are written after each model, the results of the others kept.

Each model is random, of its own class, in float32, and trained by `main_train.py` with default settings but for sizes,
in full and with LoRA. Two figures are compared with plain transformers, which computes the rows one by one:

- the loss of the first step, of the base;
- the evaluation loss after the last step, of what was saved and loaded again.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "architectures.json"
TOKENIZER = ROOT / "data" / "tiny_model"
TOLERANCE = 1e-4  # relative
SECONDS = 240  # for one model
UNTRIED = "not run yet"  # in results of a part of the architectures
MODES = {"full": ["--train_mode", "full"], "lora": []}
_QWEN4_EXP = {
    "head_dim": 16, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}  # fmt: skip
# what a default configuration lacks, or has at a size that does not shrink
SWITCHES = {
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2},
    "blt": {
        "encoder_hash_byte_group_vocab": 500,
        "encoder_config": {"hidden_size": 32, "num_attention_heads": 4, "hidden_size_global": 64},
        "decoder_config": {"hidden_size": 32, "num_attention_heads": 4, "hidden_size_global": 64},
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}, "ffn_config": {"moe_top_k": 2},
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "qwen4_exp_text": _QWEN4_EXP,
    "qwen4_exp": {"text_config": _QWEN4_EXP},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [32, 32]},
    "xlnet": {"d_model": 64, "n_head": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["hybrid", "hybrid", "linear_attention"], "num_hidden_layers": 3},
    "nemotron": {"num_key_value_heads": 4},
    "ministral": {"head_dim": 16},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1},
}  # fmt: skip
ROWS = [
    {"instruction": "What is the capital of France?", "output": "Paris."},
    {"instruction": "Count.", "input": "to ten, please", "output": "1 2 3 4 5 6 7 8 9 10"},
    {"instruction": "Be brief.", "system": "You are lazy.", "history": [["Hi", "Hello"]], "output": "Yes."},
    {"instruction": "Say hello.", "output": "Hello, quick brown fox! " * 8},
    {"instruction": "Goodbye.", "output": "Goodbye, and thank you."},
    {"instruction": "The dog?", "output": "The lazy dog sleeps in the sun."},
]


def build(kind: str, folder: Path) -> None:
    """Saves the small random model with a tokenizer."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

    from utils.model.small import small_config, small_model

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    config = CONFIG_MAPPING[kind](**SWITCHES.get(kind, {}))
    for part in (config, config.get_text_config()):
        for name, value in vars(part).items():
            if ("drop" in name or "jitter" in name) and isinstance(value, float):
                setattr(part, name, 0.0)  # it would draw other random numbers in another layout
    # tokens that sparse attention chooses: as in real models, which are not causal in rows of more
    sizes = {"vocab_size": len(tokenizer), "vocab_size_per_layer_input": len(tokenizer), "index_topk": 2048}
    model = small_model(config, sizes)
    if model is None:
        AutoModelForCausalLM.from_config(small_config(config, **sizes))  # raises the reason
        raise ValueError("no small configuration fits together")
    if model.num_parameters() > 1e8:
        raise ValueError(f"{model.num_parameters():,} weights are too many")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def plain_loss(model, rows: list[dict]) -> float:
    """Mean cross-entropy over the trained tokens, one row at a time, with the model's own logits."""
    import torch

    model.eval()
    total, count = 0.0, 0
    for row in rows:
        labels = torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
    return total / count


def load(base: Path, run: Path | None = None):
    """The model as plain transformers and PEFT load it, in float32."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = run is not None and (run / "adapter_config.json").is_file()
    model = AutoModelForCausalLM.from_pretrained(base if adapter or run is None else run, dtype=torch.float32)
    return PeftModel.from_pretrained(model, run) if adapter else model


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
        "--load_best_model_at_end", "false", *MODES[mode],
    ]  # fmt: skip
    try:
        main_train.main(flags)
    except UserError as error:
        return {"refused": str(error.problems[0]).replace(f"{str(base)!r}", "the base")}
    history = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    settings = json.loads((run / "train_args.json").read_text(encoding="utf-8"))["trainer"]
    found = {
        "layout": "end to end" if settings["padding_free"] else "padded",
        "loss": next(entry["loss"] for entry in history if "loss" in entry),
        "eval_loss": next(entry["eval_loss"] for entry in history if "eval_loss" in entry),
        "plain_loss": plain_loss(load(base), rows),
        "plain_eval_loss": plain_loss(load(base, run), rows),
    }
    found["problems"] = problems_of(found)
    return found


def problems_of(found: dict) -> list[str]:
    problems = []
    for name, what in (("loss", "the first step's loss"), ("eval_loss", "the evaluation loss of the saved weights")):
        ours, theirs = found[name], found[f"plain_{name}"]
        if not abs(ours - theirs) <= TOLERANCE * abs(theirs):
            problems.append(f"{what} is {ours:.6f}, in plain transformers {theirs:.6f}")
    if abs(found["plain_loss"] - found["plain_eval_loss"]) < 1e-6:
        problems.append("the saved weights have not moved")
    return problems


def one_line(error: BaseException) -> str:
    """`KeyError: 'dim'`; the validators of a configuration give the reason in their second line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def examine(kind: str) -> dict:
    """All of one architecture, in this process."""
    from transformers import AutoTokenizer

    from utils.data.conversations import to_messages
    from utils.template import get_template

    folder = Path(tempfile.mkdtemp(prefix="dojo-architecture-"))
    try:
        base = folder / "base"
        try:
            build(kind, base)
            load(base)
        except Exception as error:  # configurations and models raise their own
            return {"not_built": one_line(error)}
        tokenizer = AutoTokenizer.from_pretrained(base)
        rows = [get_template("qwen", tokenizer).encode(to_messages(row), tokenizer) for row in ROWS]
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


def is_right(line: dict) -> bool:
    """Whether nothing about it is silently different: trained as plain transformers, or refused in words."""
    return "not_built" in line or all("refused" in line[mode] or line[mode].get("problems") == [] for mode in MODES)


def cell(found: dict) -> str:
    """`✓ padded`, `refused: …` or `✗ …`."""
    if "refused" in found:
        text = found["refused"].partition(": ")[2] or found["refused"]
        return "refused: " + text.replace("|", "\\|")[:140]
    if "crashed" in found:
        return "✗ " + found["crashed"].replace("|", "\\|")
    return "✗ " + "; ".join(found["problems"]) if found["problems"] else f"✓ {found['layout']}"


def table(results: dict) -> str:
    """The page: counts, then a row for each architecture."""
    lines = results["models"]
    built = [line for line in lines if "not_built" not in line]
    untried = sum(line.get("not_built") == UNTRIED for line in lines)
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    counts = {
        "trained as plain transformers, rows end to end": 0, "trained as plain transformers, rows padded": 0,
        "refused": 0, "wrong": 0,
    }  # fmt: skip
    for line in built:
        full = line["full"]
        if not is_right(line):
            counts["wrong"] += 1
        elif "refused" in full:
            counts["refused"] += 1
        else:
            counts[f"trained as plain transformers, rows {full['layout']}"] += 1
    head = [
        "# Architectures", "",
        f"Written by `python -m benchmarks.architectures` on a CPU in float32 ({versions}). "
        f"{len(lines) - untried} of the {len(lines)} causal language models of transformers were tried, and "
        f"{len(built)} of them could be built small. "
        "✓: the loss of the first step, and the evaluation loss of what was saved and loaded again, equal those of "
        f"plain transformers on rows one by one to {TOLERANCE:g}.", "",
        *(f"- {name}: {count}" for name, count in counts.items()), "",
        "| architecture | full | LoRA |", "|---|---|---|",
    ]  # fmt: skip
    rows = [f"| {line['architecture']} | {cell(line['full'])} | {cell(line['lora'])} |" for line in built]
    missing = [f"- {line['architecture']}: {line['not_built']}" for line in lines if "not_built" in line]
    return "\n".join([*head, *rows, "", "Not built:", "", *missing, ""])


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
    """Writes both files, each whole or not at all."""
    texts = {RESULTS: json.dumps(results, indent=1) + "\n", RESULTS.with_suffix(".md"): table(results)}
    for file, text in texts.items():
        part = file.with_name(file.name + ".part")
        part.write_text(text, encoding="utf-8")
        part.replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", nargs="+", default=[], help="names of architectures, as in config.json's model_type")
    which.add_argument("--untried", action="store_true", help="those that have no result yet")
    parser.add_argument("--jobs", type=int, default=1, help="how many models at once")
    args = parser.parse_args()
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
