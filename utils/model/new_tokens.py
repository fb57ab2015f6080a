"""`--add_tokens`: new tokens in the tokenizer, and their rows in the embedding and the head.

A row starts at the mean of all old rows, or at the mean of the rows of its description's tokens, so that the model
begins with a token it knows nothing about, or with one that means about the same
(https://nlp.stanford.edu/~johnhew/vocab-expansion.html).
"""

import json
from pathlib import Path

from loguru import logger

from utils.runtime.errors import Problem, UserError

_FLAG = "add_tokens"


def read_new_tokens(value: str) -> tuple[dict[str, str | None], list[Problem]]:
    """Reads the value of `--add_tokens`.

    `"<call>,<end>"` → `{"<call>": None, "<end>": None}`

    Args:
        value: tokens separated by commas; a file with one in a line, a description after a tab; or a JSON object,
            token → description or null.

    Returns:
        token → description, in order; and the problems.
    """
    text = value.strip()
    try:
        if text.startswith("{"):
            pairs = list(json.loads(text, object_pairs_hook=list))
        elif Path(text).is_file():
            lines = Path(text).read_text(encoding="utf-8").splitlines()
            pairs = [(token, about or None) for token, _, about in (line.partition("\t") for line in lines if line)]
        else:
            pairs = [(token, None) for token in text.split(",")]
    except (OSError, ValueError) as error:
        return {}, [_problem(f"--{_FLAG} {value!r} cannot be read: {error}")]
    problems = []
    for token, about in pairs:
        if not token.strip() or token != token.strip():
            problems.append(f"the token {token!r} is empty, or has spaces around it, which the tokenizer would lose")
        if about is not None and not (isinstance(about, str) and about.strip()):
            problems.append(f"the description of {token!r} is {about!r}; give a text, or null")
    names = [token for token, _ in pairs]
    twice = [token for token in dict.fromkeys(names) if names.count(token) > 1]
    problems += [f"{token!r} is given {names.count(token)} times" for token in twice]
    return dict(pairs), [_problem(f"--{_FLAG}: {problem}") for problem in problems]


def _problem(message: str) -> Problem:
    remedy = "give tokens separated by commas, a file with one in a line, or a JSON object of descriptions"
    return Problem(f"{message}; {remedy}", flags=(_FLAG,))


def new_tokens(args) -> dict[str, str | None]:
    """The tokens of `--add_tokens`, token → description; empty without the flag."""
    if not args.add_tokens:
        return {}
    tokens, problems = read_new_tokens(args.add_tokens)
    if problems:
        raise UserError(*problems)
    return tokens


def extend_tokenizer(tokenizer, tokens: dict[str, str | None]) -> list[int]:
    """Adds tokens to a tokenizer.

    They are not special tokens, so that an answer is decoded with them, and a row may contain them.

    Returns:
        their ids.

    Raises:
        UserError: the tokenizer has one of them already.
    """
    from tokenizers import AddedToken

    known = [token for token in tokens if token in tokenizer.get_vocab()]
    if known:
        raise UserError(
            _problem(f"--{_FLAG}: {', '.join(map(repr, known))} is a token of {tokenizer.name_or_path!r} already")
        )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    return tokenizer.convert_tokens_to_ids(list(tokens))


def extend_model(model, tokenizer, tokens: dict[str, str | None]) -> None:
    """Gives each new token a row in the embedding and in the head.

    Rows beyond the vocabulary, to which many models are padded, are used first.

    Args:
        model: the base, loaded.
        tokenizer: with the new tokens.
        tokens: token → description.
    """
    import torch

    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    if any(weight.is_meta for weight in model.parameters()):
        raise UserError(_problem(f"--{_FLAG} adds rows to the embedding, which FSDP divides"))
    resize_embeddings(model, ids)
    layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    old = torch.tensor([token for token in tokenizer.get_vocab().values() if token not in set(ids)])
    for layer in {id(layer.weight): layer for layer in layers}.values():  # one where they are tied
        for values in (layer.weight, getattr(layer, "bias", None)):
            if values is None:
                continue
            with torch.no_grad():
                mean = values[old.to(values.device)].float().mean(dim=0)
                for token, about in zip(ids, tokens.values(), strict=True):
                    described = tokenizer(about, add_special_tokens=False)["input_ids"] if about else []
                    row = values[described].float().mean(dim=0) if described else mean
                    values[token] = row.to(values.dtype)
    logger.info("{} new tokens: {}", len(tokens), ", ".join(tokens))


def resize_embeddings(model, ids: list[int]) -> None:
    """Adds rows to embedding and head, if they have none for the largest of some ids."""
    before = model.get_input_embeddings().weight.shape[0]
    if max(ids) >= before:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        logger.info("the embeddings are resized from {:,} rows to {:,}", before, max(ids) + 1)
