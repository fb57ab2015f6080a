"""Loads a tokenizer with a pad token, and sets chat template and stop token."""

from pathlib import Path

from loguru import logger

from utils.model.base_config import load_config
from utils.model.new_tokens import extend_tokenizer, new_tokens
from utils.runtime.distributed import broadcast_object
from utils.runtime.errors import UserError, load_failure
from utils.template import Template, template_dict
from utils.template.dates import shows_date, today

_NAMED = "additional_chat_templates"  # transformers' folder for templates other than the default one
# a reserved token is better than EOS, which also ends answers
_PAD_CANDIDATES = ("<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<|endoftext|>", "<unk>")


def load_tokenizer(model_name_or_path: str, trust_remote_code: bool = False, flag: str = "--model_name_or_path"):
    """Loads a fast tokenizer with a pad token.

    Args:
        model_name_or_path: a folder or a name on a hub.
        trust_remote_code: whether Python code that comes with the model may run.
        flag: the flag that named it, for the messages.

    Raises:
        UserError: there is no tokenizer, or only a slow one, which has no offsets.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, trust_remote_code=trust_remote_code)
    except Exception as error:  # the hub, the file system and the parsers each raise their own
        raise UserError(load_failure("tokenizer", flag, model_name_or_path, error)) from error
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer of {model_name_or_path!r} has no fast version, which is needed to find the trained text. "
            "Save one with AutoTokenizer.from_pretrained(...).save_pretrained(...) of a recent transformers"
        )
    _check_vocabulary(tokenizer, model_name_or_path, trust_remote_code, flag)
    # rows are measured against --max_len, not against the tokenizer's own figure, which it would warn of
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        tokenizer.pad_token = next(
            (token for token in _PAD_CANDIDATES if token in vocabulary), tokenizer.eos_token or min(vocabulary)
        )
        logger.info("the tokenizer has no pad token; padding with {!r}", tokenizer.pad_token)
    return tokenizer


def load_run_tokenizer(args):
    """Loads a run's tokenizer: the base's, and for `auto` the chat template of the adapter the run continues from.

    Args:
        args: CommonArgs. `template_date` is set to today if the run's format prints a date and none is given.
    """
    tokenizer = load_tokenizer(args.model_name_or_path, args.trust_remote_code)
    if args.add_tokens:
        extend_tokenizer(tokenizer, new_tokens(args))
    saved = Path(args.adapter_name_or_path or "") / "chat_template.jinja"
    if args.template_name == "auto" and args.adapter_name_or_path and saved.is_file():
        named = {file.stem: file.read_text(encoding="utf-8") for file in saved.parent.glob(f"{_NAMED}/*.jinja")}
        default = saved.read_text(encoding="utf-8")
        tokenizer.chat_template = {"default": default, **named} if named else default
    named = template_dict.get(args.template_name)
    if named.shows_date if named else shows_date(tokenizer):
        args.template_date = args.template_date or broadcast_object(today())  # midnight may pass between two processes
    elif args.template_date:
        logger.warning("--template_date {}: the template prints no day, so it changes nothing", args.template_date)
    return tokenizer


def _check_vocabulary(tokenizer, path: str, trust_remote_code: bool, flag: str) -> None:
    """Refuses an empty tokenizer, as transformers loads without tokenizer.json, and ids beyond the embedding."""
    if not tokenizer("Hello", add_special_tokens=False)["input_ids"]:
        raise UserError(f"the tokenizer of {flag} {path!r} makes no tokens of a text; is its tokenizer.json missing?")
    if (Path(path) / "adapter_config.json").is_file() and not (Path(path) / "config.json").is_file():
        return
    config = load_config(path, trust_remote_code, flag).get_text_config()
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise UserError(
            f"the tokenizer of {flag} {path!r} has ids up to {largest}, and the model's embedding {config.vocab_size} "
            "rows; use the tokenizer that belongs to the model"
        )


def save_chat_format(tokenizer, template: Template, model) -> None:
    """Sets a chat format on tokenizer and model, so that they are saved with it and with its stop token."""
    apply_chat_format(tokenizer, template)
    stop_at_eos(model, tokenizer, template.call_stop if isinstance(template, Template) else "")


def apply_chat_format(tokenizer, template: Template) -> None:
    """Sets a tokenizer's chat template and EOS token; with `auto` all of its named templates are kept."""
    if isinstance(template, Template):
        tokenizer.chat_template = template.to_jinja()
    else:
        template.save_in(tokenizer)
    tokenizer.eos_token = template.stop_token()


def stop_at_eos(model, tokenizer, also: str = "") -> None:
    """Adds the tokenizer's EOS token, and the token `also`, to the stop tokens of the model's generation config."""
    config = model.generation_config
    known = [config.eos_token_id] if isinstance(config.eos_token_id, int) else list(config.eos_token_id or [])
    more = [tokenizer.convert_tokens_to_ids(also)] if also else []
    config.eos_token_id = list(dict.fromkeys([tokenizer.eos_token_id, *known, *more]))
    config.pad_token_id = tokenizer.pad_token_id
