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
    name="qwen3-hybrid",
    source="Qwen/Qwen3-8B, tokenizer_config.json, April 2025",
    models=("Qwen3", "Qwen3-Base"),
    jinja=_jinja("qwen"),
    jinja_only=True,
    settings=(("reasons", "true"),),
    **_CHATML,
)

register_template(
    name="qwen3.5",
    source="Qwen/Qwen3.5-4B, chat_template.jinja, March 2026, and the larger ones, which reason by default; texts only",
    models=("Qwen3.5 of 4B and more",),
    jinja=_jinja("qwen3.5"),
    jinja_only=True,
    settings=(("reasons", "true"),),
    **_CHATML,
)

register_template(
    name="qwen3.5-small",
    source="Qwen/Qwen3.5-2B, chat_template.jinja, March 2026, and the smaller ones, which do not reason by default; "
    "texts only",
    models=("Qwen3.5 of up to 2B",),
    jinja=_jinja("qwen3.5"),
    jinja_only=True,
    settings=(("reasons", "false"),),
    **_CHATML,
)

register_template(
    name="qwen3.6",
    source="Qwen/Qwen3.6-27B, chat_template.jinja, April 2026; texts only",
    models=("Qwen3.6",),
    jinja=_jinja("qwen3.5"),
    jinja_only=True,
    settings=(("reasons", "true"), ("json_values", "true")),
    **_CHATML,
)

register_template(
    name="smollm2",
    source="HuggingFaceTB/SmolLM2-135M-Instruct, tokenizer_config.json, October 2024",
    models=("SmolLM2",),
    default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    **_CHATML,
)

register_template(
    name="internlm2",
    source="internlm/internlm2-chat-7b, tokenizer_config.json, January 2024; the same for InternLM2.5 and 3",
    models=("InternLM2", "InternLM2.5", "InternLM3"),
    bos="{bos}",
    **_CHATML,
)

register_template(
    name="yi",
    source="01-ai/Yi-6B-Chat, tokenizer_config.json, November 2023",
    models=("Yi", "Yi-1.5"),
    **_CHATML,
)

register_template(
    name="chatml",
    source="ChatML (OpenAI, March 2023) as most fine-tunes write it: no default system message",
    models=("ChatML fine-tunes such as Hermes and Dolphin",),
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
    name="gemma-3",
    source="google/gemma-3-4b-it, chat_template.json, March 2025; texts only",
    models=("Gemma 3",),
    bos="<bos>",
    system_with_user="{system}\n\n{content}",
    user="<start_of_turn>user\n{content}<end_of_turn>\n",
    assistant="<start_of_turn>model\n",
    stop="<end_of_turn>",
    after_stop="\n",
    strip=True,
    keep_system=True,
    alternate=True,
)

register_template(
    name="gemma-4",
    source="google/gemma-4-E2B-it, chat_template.jinja, July 2026; texts only, without tools",
    models=("Gemma 4",),
    jinja=_jinja("gemma-4"),
    jinja_only=True,
    bos="<bos>",
    system="<|turn>system\n{content}<turn|>\n",
    user="<|turn>user\n{content}<turn|>\n",
    assistant="<|turn>model\n",
    stop="<turn|>",
    after_stop="\n",
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
    name="phi-4",
    source="microsoft/phi-4, tokenizer_config.json, February 2025",
    models=("Phi-4",),
    system="<|im_start|>system<|im_sep|>{content}<|im_end|>",
    user="<|im_start|>user<|im_sep|>{content}<|im_end|>",
    assistant="<|im_start|>assistant<|im_sep|>",
    stop="<|im_end|>",
)

register_template(
    name="phi-4-mini",
    source="microsoft/Phi-4-mini-instruct, tokenizer_config.json, February 2025; without tools",
    models=("Phi-4-mini",),
    system="<|system|>{content}<|end|>",
    user="<|user|>{content}<|end|>",
    assistant="<|assistant|>",
    stop="<|end|>",
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

# the tokenizers v3 and v7 of mistral-common, whose own texts have no default system message
_MISTRAL = {"bos": "<s>", "assistant": "", "stop": "</s>", "alternate": True}

register_template(
    name="mistral-v3",
    source="mistralai/mistral-common, chat_templates/templates/v3_spm.jinja, 2025; without tools",
    models=("Mistral-7B-Instruct-v0.3", "Mixtral-8x22B-Instruct-v0.1", "Mistral-Small-2409"),
    jinja=_jinja("mistral-v3"),
    jinja_system=True,
    exact_marks=False,
    settings=(("space", "' '"),),
    user="[INST] {content}[/INST]",
    before_answer=" ",
    **_MISTRAL,
)

register_template(
    name="mistral-v3-tekken",
    source="mistralai/mistral-common, chat_templates/templates/v3.jinja, 2025; without tools",
    models=("Mistral-Nemo-Instruct-2407", "Ministral-8B-Instruct-2410"),
    jinja=_jinja("mistral-v3"),
    jinja_system=True,
    exact_marks=False,
    settings=(("space", "''"),),
    user="[INST]{content}[/INST]",
    **_MISTRAL,
)

register_template(
    name="mistral-v7-tekken",
    source="mistralai/mistral-common, chat_templates/templates/v7.jinja, 2025; without tools",
    models=("Mistral-Small-24B-Instruct-2501", "Mistral-Small-3.1 and 3.2"),
    system_at_start=True,
    system="[SYSTEM_PROMPT]{content}[/SYSTEM_PROMPT]",
    user="[INST]{content}[/INST]",
    **_MISTRAL,
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

# a system turn that shows a date, and tools in the first question
_LLAMA3_1 = {
    "jinja": _jinja("llama3.1"),
    "system_at_start": True,
    "bos": "<|begin_of_text|>",
    "default_system": "",
    "user": "<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>",
    "assistant": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "stop": "<|eot_id|>",
    "strip": True,
}

register_template(
    name="llama3.1",
    source="meta-llama/Llama-3.1-8B-Instruct, tokenizer_config.json, September 2024; the same for 3.3; without its "
    "built-in tools",
    models=("Llama-3.1", "Llama-3.3"),
    system="<|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n{content}<|eot_id|>",
    **_LLAMA3_1,
)

register_template(
    name="llama3.2",
    source="meta-llama/Llama-3.2-1B-Instruct, tokenizer_config.json, September 2024",
    models=("Llama-3.2",),
    settings=(("date_string", "date_string or strftime_now('%d %b %Y')"),),
    system="<|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: {date:%d %b %Y}\n\n{content}<|eot_id|>",
    **_LLAMA3_1,
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
    name="deepseek-r1",
    source="deepseek-ai/DeepSeek-R1-Distill-Qwen-7B, tokenizer_config.json, January 2025; the last answer keeps its "
    "reasoning, which the released text leaves out; without tools",
    models=("DeepSeek-R1", "DeepSeek-R1-Distill-Qwen", "DeepSeek-R1-Distill-Llama"),
    jinja=_jinja("deepseek-r1"),
    jinja_only=True,
    bos="<｜begin▁of▁sentence｜>",
    system="{content}",
    user="<｜User｜>{content}",
    assistant="<｜Assistant｜>",
    stop="<｜end▁of▁sentence｜>",
)

register_template(
    name="glm-4.5",
    source="zai-org/GLM-4.5, chat_template.jinja, July 2025",
    models=("GLM-4.5", "GLM-4.5-Air", "GLM-4.6"),
    jinja=_jinja("glm-4.5"),
    jinja_only=True,
    bos="[gMASK]<sop>",
    system="<|system|>\n{content}",
    user="<|user|>\n{content}",
    assistant="<|assistant|>",
    before_answer="\n<think></think>\n",
    stop="",
    closing="<|user|>",
    call_stop="<|observation|>",
)

register_template(
    name="cohere2",
    source="CohereLabs/tiny-aya-earth, chat_template.jinja, February 2026",
    models=("Tiny Aya",),
    jinja=_jinja("cohere2"),
    jinja_only=True,
    bos="<BOS_TOKEN>",
    system="<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{content}<|END_OF_TURN_TOKEN|>",
    user="<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{content}<|END_OF_TURN_TOKEN|>",
    assistant="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>",
    after_answer="<|END_RESPONSE|>",
    stop="<|END_OF_TURN_TOKEN|>",
)

_LFM2 = {"jinja": _jinja("lfm2"), "bos": "<|startoftext|>", "jinja_only": True, **_CHATML}

register_template(
    name="lfm2",
    source="LiquidAI/LFM2-1.2B, chat_template.jinja, November 2025",
    models=("LFM2",),
    settings=(("reasons", "false"),),
    **_LFM2,
)

register_template(
    name="lfm2.5",
    source="LiquidAI/LFM2.5-230M, chat_template.jinja, 2026",
    models=("LFM2.5",),
    settings=(("reasons", "true"),),
    **_LFM2,
)

_NEMOTRON_3 = {"jinja": _jinja("nemotron-3"), "jinja_only": True, **_CHATML}

register_template(
    name="nemotron-3",
    source="nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16, chat_template.jinja, December 2025; the same for Super",
    models=("Nemotron 3 Nano", "Nemotron 3 Super"),
    settings=(("tight", "false"),),
    **_NEMOTRON_3,
)

register_template(
    name="nemotron-3-ultra",
    source="nvidia/NVIDIA-Nemotron-3-Ultra, chat_template.jinja, 2026; the same for 3.5 Lightning",
    models=("Nemotron 3 Ultra", "Nemotron 3.5 Lightning"),
    settings=(("tight", "true"),),
    **_NEMOTRON_3,
)

register_template(
    name="smollm3",
    source="HuggingFaceTB/SmolLM3-3B, chat_template.jinja, July 2025; reasoning in a field of its own is shown as "
    "well; without tools",
    models=("SmolLM3",),
    jinja=_jinja("smollm3"),
    jinja_only=True,
    **_CHATML,
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
