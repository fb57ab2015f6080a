"""Cards of runs: the text, and the answers in it."""

FP32 = ["--precision", "fp32"]
DPO = ["--train_args_path", "train_args/dpo/base.py"]
PRETRAIN = ["--train_args_path", "train_args/pretrain/base.py"]
ANSWERS = ["--card_samples", "3"]


def card_of(folder) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def answers_of(card: str, title: str) -> list[str]:
    """The fenced texts under `Before:`, say."""
    found = card.split(f"{title}\n\n```text\n")[1:]
    return [text.split("\n```")[0] for text in found]
