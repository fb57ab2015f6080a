"""The chat templates, one `register_template(...)` call each.

A call holds all that is specific to a format; `utils/template/format.py` renders and encodes all of them. What a format
writes beside plain turns, such as tool calls and reasoning, is in its Jinja text in `utils/template/formats/`.
"""

from pathlib import Path

from utils.template.format import Message, Template
from utils.template.registry import get_template, register_template, template_dict
from utils.template.tokenize import IGNORE_INDEX, label_spans

__all__ = ["IGNORE_INDEX", "Message", "Template", "get_template", "label_spans", "register_template", "template_dict"]


def _jinja(name: str) -> str:
    return (Path(__file__).parent / "formats" / f"{name}.jinja").read_text(encoding="utf-8")


register_template(
    name="default",
    source="this project; plain text that any tokenizer with an eos token can hold",
    models=("base models without a chat format of their own",),
    bos="{bos}",
    system="System: {content}\n\n",
    user="User: {content}\n\n",
    # a line feed, since a space would merge with the answer's first token or become an untrained token of its own
    assistant="Assistant:\n",
    stop="{eos}",
    after_stop="\n\n",
)

# ChatML (OpenAI, 2023); the families differ only in the default system message
_CHATML = {
    "system": "<|im_start|>system\n{content}<|im_end|>\n",
    "user": "<|im_start|>user\n{content}<|im_end|>\n",
    "assistant": "<|im_start|>assistant\n",
    "stop": "<|im_end|>",
    "after_stop": "\n",
}

register_template(
    name="qwen",
    source="Qwen/Qwen1.5-7B-Chat, tokenizer_config.json, February 2024",
    models=("Qwen1.5",),
    default_system="You are a helpful assistant",
    **_CHATML,
)

register_template(
    name="qwen2",
    source="Qwen/Qwen2-7B-Instruct, tokenizer_config.json, June 2024",
    models=("Qwen2",),
    default_system="You are a helpful assistant.",
    **_CHATML,
)

register_template(
    name="qwen2.5",
    source="Qwen/Qwen2.5-7B-Instruct, tokenizer_config.json, September 2024",
    models=("Qwen2.5",),
    default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    jinja=_jinja("qwen"),
    **_CHATML,
)

register_template(
    name="qwen3",
    source="Qwen/Qwen3-4B-Instruct-2507, tokenizer_config.json, July 2025 (non-thinking)",
    models=("Qwen3-Instruct-2507",),
    jinja=_jinja("qwen"),
    **_CHATML,
)

register_template(
    name="yi",
    source="01-ai/Yi-6B-Chat, tokenizer_config.json, November 2023",
    models=("Yi", "Yi-1.5"),
    **_CHATML,
)

register_template(
    name="gemma",
    source="google/gemma-7b-it, tokenizer_config.json, February 2024; the same for Gemma 1.1 and 2",
    models=("Gemma", "Gemma 1.1", "Gemma 2"),
    bos="<bos>",
    user="<start_of_turn>user\n{content}<end_of_turn>\n",
    assistant="<start_of_turn>model\n",
    stop="<end_of_turn>",
    after_stop="\n",
    strip=True,
    alternate=True,
)

register_template(
    name="phi-3",
    source="microsoft/Phi-3-mini-4k-instruct, tokenizer_config.json, July 2024",
    models=("Phi-3", "Phi-3.5"),
    system="<|system|>\n{content}<|end|>\n",
    user="<|user|>\n{content}<|end|>\n",
    assistant="<|assistant|>\n",
    stop="<|end|>",
    after_stop="\n",
    end="<|endoftext|>",
)

register_template(
    name="deepseek",
    source="deepseek-ai/deepseek-llm-7b-chat, tokenizer_config.json, November 2023; the same for V2-Chat",
    models=("DeepSeek LLM", "DeepSeek-V2"),
    bos="<｜begin▁of▁sentence｜>",
    system="{content}\n\n",
    user="User: {content}\n\n",
    assistant="Assistant:",
    before_answer=" ",
    stop="<｜end▁of▁sentence｜>",
)

register_template(
    name="mistral",
    source="mistralai/Mistral-7B-Instruct-v0.2, tokenizer_config.json, December 2023; "
    "with tools: Mistral-7B-Instruct-v0.3, tokenizer_config.json, August 2024",
    models=("Mistral-Instruct v0.1", "Mistral-Instruct v0.2"),
    jinja=_jinja("mistral"),
    bos="<s>",
    user="[INST] {content} [/INST]",
    assistant="",
    stop="</s>",
    alternate=True,
)

register_template(
    name="minicpm",
    source="openbmb/MiniCPM-2B-sft-bf16, tokenizer_config.json and finetune.py, February 2024",
    models=("MiniCPM-2B",),
    system="{content}",
    user="<用户>{content}<AI>",
    assistant="",
    stop="",
    closing="</s>",
    strip=True,
)

register_template(
    name="llama2",
    source="meta-llama/Llama-2-7b-chat-hf, tokenizer_config.json, July 2023",
    models=("Llama-2",),
    system_with_user="<<SYS>>\n{system}\n<</SYS>>\n\n{content}",
    user="<s>[INST] {content} [/INST]",
    assistant="",
    before_answer=" ",
    after_answer=" ",
    stop="</s>",
    strip=True,
    alternate=True,
)

register_template(
    name="llama3",
    source="meta-llama/Meta-Llama-3-8B-Instruct, tokenizer_config.json, April 2024",
    models=("Llama-3",),
    bos="<|begin_of_text|>",
    system="<|start_header_id|>system<|end_header_id|>\n\n{content}<|eot_id|>",
    user="<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>",
    assistant="<|start_header_id|>assistant<|end_header_id|>\n\n",
    stop="<|eot_id|>",
    strip=True,
)

register_template(
    name="llama3.1",
    source="meta-llama/Llama-3.1-8B-Instruct, tokenizer_config.json, September 2024; without its built-in tools",
    models=("Llama-3.1",),
    jinja=_jinja("llama3.1"),
    system_at_start=True,
    bos="<|begin_of_text|>",
    default_system="",
    system="<|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n{content}<|eot_id|>",
    user="<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>",
    assistant="<|start_header_id|>assistant<|end_header_id|>\n\n",
    stop="<|eot_id|>",
    strip=True,
)

register_template(
    name="deepseek-v3",
    source="deepseek-ai/DeepSeek-V3, tokenizer_config.json, December 2024, and its successors without reasoning; "
    "the list of tools as in the model card of DeepSeek-V2.5",
    models=("DeepSeek-V3",),
    jinja=_jinja("deepseek-v3"),
    system_at_start=True,
    bos="<｜begin▁of▁sentence｜>",
    system="{content}",
    user="<｜User｜>{content}",
    assistant="<｜Assistant｜>",
    stop="<｜end▁of▁sentence｜>",
)

register_template(
    name="gpt-oss",
    source="openai/gpt-oss-20b, chat_template.jinja, August 2025; without its built-in tools",
    models=("gpt-oss",),
    jinja=_jinja("gpt-oss"),
    jinja_only=True,
    system="<|start|>developer<|message|># Instructions\n\n{content}\n\n<|end|>",
    user="<|start|>user<|message|>{content}<|end|>",
    assistant="<|start|>assistant",
    before_answer="<|channel|>final<|message|>",
    stop="<|return|>",
    call_stop="<|call|>",
)
