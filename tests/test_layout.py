"""The house: what lies at the top, which way data flows, and how long a file may be."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

# a module may import those before it, never those after
FLOW = [
    "imports",
    "log",
    "launch",
    "errors",
    "paths",
    "finding_codes",
    "findings",
    "weight_files",
    "pickles",
    "checkpoints",
    "run_files",
    "run_lock",
    "segments",
    "template_jinja",
    "template_go",
    "data_fields",
    "turns",
    "template_format",
    "template_day",
    "template_spans",
    "template_parts",
    "template_reading",
    "template_auto",
    "template",
    "data_json",
    "data_splits",
    "data_nulls",
    "data_tables",
    "data_files",
    "quantised_base",
    "check_adapter",
    "check_args",
    "check_deepspeed",
    "check_dpo",
    "check_evaluation",
    "check_run",
    "precision",
    "flags",
    "recipe",
    "record",
    "config_file",
    "replaced",
    "sources",
    "args",
    "idle",
    "tokenizer",
    "template_derived",
    "modelfile",
    "data_report",
    "data_turns",
    "data_rows",
    "data_pairs",
    "prompts",
    "shorten",
    "shorten_pairs",
    "data_encode",
    "data_keys",
    "data_process",
    "data_collator",
    "model_parts",
    "adapter_targets",
    "small_model",
    "probe_state",
    "adapter_start",
    "head",
    "rope",
    "adapter",
    "attention",
    "base_config",
    "balance",
    "pissa",
    "adapter_files",
    "merge_check",
    "merge_layers",
    "model",
    "trained",
    "merge_files",
    "merge_folder",
    "merge",
    "base_generation",
    "generate",
    "answers",
    "chat",
    "metrics",
    "choices",
    "contenders",
    "assess",
    "assess_report",
    "resume_rules",
    "resume",
    "probe",
    "layout",
    "memory.live",
    "memory.model",
    "memory.layout",
    "memory.states",
    "memory.fake",
    "memory.activations",
    "memory.planner",
    "memory.ladder",
    "memory",
    "trainer",
    "filler",
    "evaluation",
    "neftune",
    "tasks.common",
    "tasks.sft",
    "tasks.pretrain",
    "tasks.dpo",
    "tasks.dpo_multi",
    "tasks.dpo_single",
    "tasks",
    "memory",
    "doctor_text",
    "doctor_census",
    "doctor_rows",
    "doctor_lengths",
    "doctor_template",
    "doctor_sizes",
    "doctor_tokens",
    "doctor_quantised",
    "doctor_settings",
    "doctor",
    "doctor_whole",
    "callbacks",
    "plot",
    "samples",
    "markdown",
    "card",
    "summary",
    "save",
    "plan",
    "explain",
    "explain_report",
    "proof_figures",
    "proof_plain",
    "proof_subject",
    "proofs_loss",
    "proofs_model",
    "proofs_runs",
    "proofs",
    "script",
]
SOURCES = sorted((ROOT / "utils").rglob("*.py"))


def place(module: str) -> int:
    """Where a module stands in the flow, by its longest listed prefix."""
    name = module.removeprefix("utils.")
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in FLOW:
            return FLOW.index(".".join(parts[:length]))
    raise AssertionError(f"{module} has no place in the flow; add it to FLOW")


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imports_of(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from [node.module] if node.module != "utils" else [f"utils.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", [p for p in SOURCES if module_of(p) != "utils"], ids=module_of)
def test_nothing_imports_upward(path):
    here = place(module_of(path))
    for name in imports_of(path):
        assert name != "main_train", f"{path} imports main_train"
        if name.startswith("utils."):
            assert place(name) <= here, f"{path} imports {name}, which comes after it"


def test_top_level_names():
    wanted = {
        "main_train.py",
        "utils",
        "train_args",
        "data",
        "pic",
        "README.md",
        "README_zh.md",
        "requirements.txt",
        "requirements-dev.txt",
        "LICENSE",
        "pyproject.toml",
        "tests",
        ".ci",
    }
    assert wanted <= {path.name for path in ROOT.iterdir()}


@pytest.mark.parametrize("path", [*SOURCES, ROOT / "main_train.py", *sorted((ROOT / "data").rglob("*.py"))], ids=str)
def test_files_stay_short_enough_to_read(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300
