"""Tiny random models of each real architecture, with tokenizers trained on the spot."""

import copy
import functools
import json
import re
from pathlib import Path

TEXT = [
    "The quick brown fox jumps over the lazy dog. What is the capital of France? Paris is.",
    "You are a helpful assistant. Be brief. Answer in verse, please! 1 + 2 = 3; 10 - 4 = 6.",
    "你好，请介绍一下你自己。我是一个人工智能助手，很高兴认识你！再见。",
    "system user assistant System: User: Assistant: \n\n\t [INST] [/INST] <<SYS>> <</SYS>>",
] * 4
CHAT_TOKENS = ["<|im_start|>", "<|im_end|>"]
ARCHITECTURES = ("qwen2", "llama", "gemma", "phi3", "mistral")
# what those lack, small enough to matter at this size: caps and scales of logits, a bias of the head, sliding windows
VARIANTS = {
    "gemma2_softcap": ("gemma2", {"final_logit_softcapping": 0.2, "attn_logit_softcapping": 0.2, "sliding_window": 8}),
    "gemma3_window": ("gemma3_text", {"sliding_window": 8}),
    "cohere_scale": ("cohere", {"logit_scale": 0.25}),
    "granite_scale": ("granite", {"logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}),
    "phi_bias": ("phi", {}),
    "mistral_window": ("mistral", {"sliding_window": 8}),
}


def byte_level_tokenizer():
    """A byte-level BPE as Qwen's, without a chat template; a new one at each call, since tests change them."""
    return copy.deepcopy(_byte_level_tokenizer())


def sentencepiece_tokenizer():
    """A BPE with byte fallback and a dummy prefix, as Llama-2's and Mistral's; a new one at each call."""
    return copy.deepcopy(_sentencepiece_tokenizer())


@functools.cache
def _byte_level_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>", *CHAT_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


@functools.cache
def _sentencepiece_tokenizer():
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # a space only begins a piece, as SentencePiece trains it
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=pieces, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    state = json.loads(tokenizer.to_str())
    # the trainer makes special tokens of the bytes; in a real tokenizer they are plain entries
    state["added_tokens"] = state["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def tokenizer_for(template, make):
    """A tokenizer that has the template's own tokens, as the model it is for does."""
    tokenizer = copy.deepcopy(make())
    tokens = {template.bos, template.stop, template.closing, template.end} - {"", "{bos}", "{eos}"}
    forms = [template.system or "", template.user, template.assistant]
    tags = r"|\[/?[A-Z_]+\]" if template.name.startswith("mistral-v") else ""  # tokens since the tokenizer v3
    tokens |= {token for form in forms for token in re.findall(r"<\|[^|]+\|>|<start_of_turn>|<用户>|<AI>" + tags, form)}
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(tokens)})
    return tokenizer


def config_for(architecture: str, vocab_size: int, **changes):
    """The configuration class of an architecture, or of one of `VARIANTS`, at a size that runs in milliseconds."""
    from transformers import AutoConfig

    architecture, own = VARIANTS.get(architecture, (architecture, {}))
    size = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **own,
        **changes,
    }
    if architecture == "mistral":
        size.setdefault("sliding_window", None)
    return AutoConfig.for_model(architecture, **size)


def save_tiny_model(folder: Path, architecture: str = "qwen2", tokenizer=None, seed: int = 0, **changes) -> str:
    """Saves a random model with its tokenizer; returns the folder as text."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = tokenizer or byte_level_tokenizer()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_for(architecture, len(tokenizer), **changes))
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        torch.nn.init.normal_(bias)  # zeros at the start, which could be left out unnoticed
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


ROWS = [
    {"instruction": "What is the capital of France?", "output": "Paris."},
    {"instruction": "Say hello to the fox.", "output": "Hello, quick brown fox! " * 6},
    {"instruction": "你是谁？", "output": "我是一个人工智能助手。"},
    {"instruction": "1 + 2 =", "output": "3"},
    {"instruction": "Count.", "input": "to ten, please", "output": "1 2 3 4 5 6 7 8 9 10"},
    {"instruction": "Be brief.", "system": "You are lazy.", "history": [["Hi", "Hello"]], "output": "Yes."},
    {"instruction": "The dog?", "output": "The lazy dog."},
    {"instruction": "Goodbye.", "output": "再见！祝您生活愉快。"},
]

# question → answer, for runs that are to know them by heart
LEARNED = [("Hi", "Hello!"), ("Who?", "The fox."), ("再见", "好。")]
PAIRS = [
    {"prompt": "What is the capital of France?", "chosen": "Paris is.", "rejected": "The lazy dog jumps over Paris."},
    {"prompt": "Say hello.", "chosen": "Hello, quick brown fox!", "rejected": "No."},
    {"prompt": "你是谁？", "system": "You are lazy.", "chosen": "我是一个人工智能助手。", "reject": "再见！"},
    {
        "prompt": [{"role": "user", "content": "1 + 2?"}],
        "chosen": [{"role": "assistant", "content": "3"}],
        "rejected": [{"role": "assistant", "content": "6, please!"}],
    },
    {
        "chosen": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Be brief."},
            {"role": "assistant", "content": "Yes."},
        ],
        "rejected": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Be brief."},
            {"role": "assistant", "content": "I am a helpful assistant, and very happy to be brief."},
        ],
    },
    {"prompt": "Count.", "chosen": "1 2 3 4", "rejected": "Count count count."},
    {"prompt": "The dog?", "chosen": "The lazy dog.", "rejected": "The quick brown fox jumps."},
    {"prompt": "Goodbye.", "chosen": "再见！", "rejected": "Hello again, and again, and again."},
]
