"""Computes RoPE frequencies that depend on the sequence length for each row by itself.

`longrope` (arXiv 2402.13753) changes all its frequencies once a row is longer than `original_max_position_embeddings`,
and `dynamic` NTK scaling stretches them with the length. transformers 5.23 decides by the largest position of the whole
batch, so one long row changes every other row; and after a long row a dynamic model keeps its frequencies for rows
that are shorter but still long.
"""

import types


def use_row_rope(model) -> None:
    """Replaces the forward of every rotary embedding of such a kind by one that computes row by row.

    Args:
        model: transformers' model, before PEFT wraps it; a model without such embeddings stays as it is.
    """
    found = [module for module in model.modules() if _depends_on_length(module)]
    for module in found:
        module.forward = types.MethodType(_row_by_row, module)
    if found:
        # the default positions count up to the longest row, for every row
        model.base_model.register_forward_pre_hook(_add_positions, with_kwargs=True)


def depends_on_length(config) -> bool:
    """Whether a model's RoPE frequencies depend on the longest row of a batch."""
    rope = str(getattr(config, "rope_parameters", None))
    return "longrope" in rope or "dynamic" in rope


def _depends_on_length(module) -> bool:
    kinds = getattr(module, "rope_type", None)
    kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any(isinstance(kind, str) and (kind == "longrope" or "dynamic" in kind) for kind in kinds)


def _row_by_row(self, x, position_ids, *args, **kwargs):
    """Calls the class's own forward for each row.

    Args:
        position_ids: [1, T], starting again at 0 with each row, or [B, L].
    """
    import torch

    plain = type(self).forward
    rows = [row[None] for row in position_ids]
    if len(rows) == 1:
        starts = torch.nonzero(position_ids[0] == 0).flatten().tolist()
        rows = rows[0].tensor_split([start for start in starts if start], dim=1)
    parts = []
    for row in rows:
        _forget_longer_rows(self)
        parts.append(plain(self, x, row, *args, **kwargs))
    along = 0 if len(position_ids) > 1 else 1
    if torch.is_tensor(parts[0]):
        return torch.cat(parts, dim=along)
    return tuple(torch.cat(values, dim=along) for values in zip(*parts, strict=True))


def _forget_longer_rows(module) -> None:
    """Resets a dynamic embedding, which keeps the frequencies of the longest row so far."""
    if getattr(module, "max_seq_len_cached", None) != getattr(module, "original_max_seq_len", None):
        module.inv_freq = module.original_inv_freq.to(module.inv_freq.device)
        module.max_seq_len_cached = module.original_max_seq_len


def _add_positions(module, args, kwargs):
    """Adds `position_ids` computed from the mask of padded rows: 0 where there is padding."""
    mask = kwargs.get("attention_mask")
    if (
        kwargs.get("position_ids") is None
        and mask is not None
        and mask.dim() == 2
        and not kwargs.get("past_key_values")
    ):
        kwargs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0) * mask
    return args, kwargs
