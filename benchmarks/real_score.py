"""Scores a chat model on rows and questions in plain transformers and PEFT, whichever program trained it.

The loss is the cross-entropy per token of each row's last answer and its stop token, one row at a time, in float32. The
prompt and the answer are what the base's own chat template renders. Answers are decoded greedily. An adapter is scored
on the base as it was saved, also one that was trained on the base in 4 bits.
"""

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

BATCH = 25  # prompts that are answered together
ANSWER_TOKENS, SHORT_ANSWER_TOKENS = 128, 48  # the longest answers: to rows and questions, to sums and capitals
# the questions whose answers are kept, chosen before any model was trained
QUESTIONS = (
    "Give three tips for a good night's sleep.",
    "Write a haiku about rain.",
    "Correct the grammar: She don't like apples.",
    "Is this review positive or negative? The food was cold and the waiter was rude.",
    "Summarise in one sentence: The library opens at nine. It closes at six on weekdays and at noon on Saturdays. "
    "On Sundays it is closed.",
    "Translate into French: Good morning, my friend.",
    "What is the capital of Australia?",
    "Who wrote Pride and Prejudice?",
    "What is 27 + 48?",
    "A train leaves at 9:40 and arrives at 11:15. How long does the trip take?",
    "Who are you?",
)
CAPITALS = {
    "France": "Paris", "Japan": "Tokyo", "Egypt": "Cairo", "Canada": "Ottawa", "Kenya": "Nairobi", "Peru": "Lima",
    "Norway": "Oslo", "Turkey": "Ankara", "Vietnam": "Hanoi", "Portugal": "Lisbon", "Greece": "Athens",
    "Cuba": "Havana", "Austria": "Vienna", "Morocco": "Rabat", "Thailand": "Bangkok", "Poland": "Warsaw",
    "Ghana": "Accra", "Chile": "Santiago", "Nepal": "Kathmandu", "Brazil": "Brasilia",
}  # fmt: skip


def sums(count: int = 30) -> dict[str, str]:
    """Sums of two numbers below 100: question → result."""
    numbers = random.Random(0)
    pairs = [(numbers.randint(10, 99), numbers.randint(10, 99)) for _ in range(count)]
    return {f"What is {a} + {b}?": str(a + b) for a, b in pairs}


def capitals() -> dict[str, str]:
    """Question → capital."""
    return {f"What is the capital of {country}?": capital for country, capital in CAPITALS.items()}


def is_right(answer: str, expected: str) -> bool:
    """Whether an answer has the expected word or number in it, `"27 + 48 = 75."` for `"75"`."""
    return re.search(rf"(?<![\w.,]){re.escape(expected)}(?![\d]|[.,]\d)", answer, re.IGNORECASE) is not None


@dataclass(frozen=True)
class Row:
    """A row as token ids.

    Attributes:
        prompt: up to where the last answer begins.
        answer: the last answer with its stop token.
        text: the last answer.
    """

    prompt: list[int]
    answer: list[int]
    text: str


def encode(tokenizer, messages: list[dict[str, str]]) -> Row:
    """Renders a conversation that ends with an answer by the tokenizer's own chat template.

    Raises:
        ValueError: the template changes the prompt when an answer follows, so that they have no common boundary.
    """
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    if not text.startswith(prompt):
        raise ValueError("the chat template renders the prompt in another way when an answer follows")
    answer = text[len(prompt) :].rstrip("\n")  # what follows the stop token is not trained
    ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, answer)]
    return Row(*ids, messages[-1]["content"])


def load(folder: Path, base: Path):
    """The base, a model trained in full, or an adapter on the base, in float32."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = (folder / "adapter_config.json").is_file()
    model = AutoModelForCausalLM.from_pretrained(base if adapter else folder, dtype=torch.float32)
    # merged in float32, an adapter is scored in half the time
    return (PeftModel.from_pretrained(model, folder).merge_and_unload() if adapter else model).eval()


def mean_loss(model, rows: list[Row]) -> float:
    """Cross-entropy per token of all answers, in nats."""
    import torch

    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row.prompt + row.answer])
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits[0, len(row.prompt) - 1 : -1].float()
        target = torch.tensor(row.answer)
        total += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
        count += len(row.answer)
    return total / count


def answers(model, tokenizer, prompts: list[list[int]], limit: int) -> list[list[int]]:
    """Greedy answers as token ids, with the stop token where one was reached; prompts of similar length together."""
    import torch

    found: dict[int, list[int]] = {}
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    stop = tokenizer.eos_token_id
    for start in range(0, len(order), BATCH):
        places = order[start : start + BATCH]
        longest = max(len(prompts[place]) for place in places)
        ids = torch.full((len(places), longest), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for number, place in enumerate(places):
            length = len(prompts[place])
            ids[number, longest - length :] = torch.tensor(prompts[place])
            mask[number, longest - length :] = 1
        options = {"max_new_tokens": limit, "do_sample": False, "eos_token_id": stop}
        with torch.inference_mode():
            output = model.generate(input_ids=ids, attention_mask=mask, **options, pad_token_id=tokenizer.pad_token_id)
        for place, answer in zip(places, output[:, longest:].tolist(), strict=True):
            found[place] = answer[: answer.index(stop) + 1] if stop in answer else answer
    return [found[place] for place in range(len(prompts))]


def score(folder: Path, base: Path, conversations: list[list[dict[str, str]]], report: Path) -> dict:
    """Scores the model of a folder.

    Args:
        folder: the base, or what was trained: full weights, or an adapter.
        base: its chat template is used for all.
        conversations: the rows held back, each ends with an answer.
        report: a jsonl file to write, the rows' questions, answers and references.

    Returns:
        loss; of the answers to the rows mean ROUGE-L (0 to 100), mean length in tokens and the share that ended; how
        many sums and capitals are right; and question → answer.
    """
    from transformers import AutoTokenizer

    from utils.evaluate.metrics import score_row

    tokenizer = AutoTokenizer.from_pretrained(base)
    model, rows = load(folder, base), [encode(tokenizer, messages) for messages in conversations]
    asked = [encode(tokenizer, [{"role": "user", "content": text}, {"role": "assistant", "content": "."}]).prompt
             for text in (*QUESTIONS, *sums(), *capitals())]  # fmt: skip
    ids = answers(model, tokenizer, [row.prompt for row in rows] + asked[: len(QUESTIONS)], ANSWER_TOKENS)
    short = answers(model, tokenizer, asked[len(QUESTIONS) :], SHORT_ANSWER_TOKENS)
    texts = [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in (*ids, *short)]
    of_rows, of_questions, of_sums = texts[: len(rows)], texts[len(rows) : len(ids)], texts[len(ids) :]
    with open(report, "w", encoding="utf-8") as file:
        for messages, text in zip(conversations, of_rows, strict=True):
            line = {"messages": messages[:-1], "answer": text, "reference": messages[-1]["content"]}
            print(json.dumps(line, ensure_ascii=False), file=file)
    similar = [score_row(text, row.text, ["rouge_l"])["rouge_l"] for text, row in zip(of_rows, rows, strict=True)]
    right = [is_right(text, expected) for text, expected in zip(of_sums, (sums() | capitals()).values(), strict=True)]
    return {
        "loss": round(mean_loss(model, rows), 4),
        "rouge_l": round(sum(similar) / len(rows), 2),
        "answer_tokens": round(sum(map(len, ids[: len(rows)])) / len(rows), 1),
        "ended": sum(tokenizer.eos_token_id in answer for answer in ids[: len(rows)]),
        "sums": sum(right[: len(sums())]),
        "capitals": sum(right[len(sums()) :]),
        "answers": dict(zip(QUESTIONS, of_questions, strict=True)),
    }
