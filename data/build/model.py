"""Makes the embedded tiny model: a random Qwen2, pretrained by this project's own task, stored as bf16."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROW_LENGTH = 256  # tokens in a packed row: four or five documents
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def _generation_config(tokenizer):
    """Returns greedy decoding that ends where a text ends; a chat run adds its own stop token when it is saved."""
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=64,
    )


def write_random_model(tokenizer_folder: Path, folder: Path, seed: int) -> int:
    """Writes a random Qwen2 of at most four million parameters, with its tokenizer.

    Returns:
        The number of parameters.
    """
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    config = Qwen2Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,  # a multiple of 64, as matrix units like it
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = _generation_config(tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


def pretrain(init_folder: Path, text_file: Path, folder: Path, seed: int) -> None:
    """Runs the project's pretrain task on the random model.

    Raises:
        subprocess.CalledProcessError: if the run fails; its own message stands above.
    """
    flags = {
        "train_args_path": "train_args/pretrain/base.py",
        "model_name_or_path": init_folder,
        "train_data_path": text_file,
        "output_dir": folder,
        "train_mode": "full",
        "precision": "fp32",  # as fast here as bf16, and exact
        "max_len": ROW_LENGTH,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-3,
        "warmup_steps": 0.02,
        "logging_steps": 50,
        "eval_strategy": "no",
        "save_steps": 0.5,
        "save_total_limit": 1,
        "report_to": "none",
        "seed": seed,
        "allow_special_tokens_in_content": True,  # the chat forms of the text are made of the tokens
    }
    command = [sys.executable, "main_train.py"]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    subprocess.run([*command, "--overwrite_output_dir"], cwd=ROOT, check=True)


def export(trained_folder: Path, tokenizer_folder: Path, folder: Path) -> int:
    """Writes the trained weights as bf16, with the tokenizer as it was made, without a chat template.

    Returns:
        The size of the folder in bytes.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(trained_folder, dtype=torch.float32).to(torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    model.generation_config = _generation_config(tokenizer)
    # the run ended texts as its chat template does and needed no cache; the base is neither a chat nor in training
    model.config.eos_token_id, model.config.use_cache = tokenizer.eos_token_id, True
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer_folder / name, folder / name)
    return sum(file.stat().st_size for file in folder.iterdir())
