"""Computes SDPA attention over packed rows block by block.

transformers 5.23 gives rows that are concatenated without padding a block-diagonal mask of tokens × tokens, and PyTorch
computes the masked parts too: for n rows of equal length n times the arithmetic. Computed by blocks the results are the
same. The blocks are read from the mask, so whatever a model masks within a row, such as a sliding window, stays masked.
"""

# mean tokens of a row from which blocks are used on a GPU, where each is a kernel launch of its own; not measured
GPU_BLOCKS_FROM = 512


def use_row_attention() -> None:
    """Replaces the attention function `sdpa` of every model of this process; masks without blocks change nothing."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attend(module, query, key, value, attention_mask, **kwargs):
        blocks = _blocks_of(attention_mask)
        if len(blocks) < 2 or kwargs.get("position_bias") is not None or query.shape[2] != key.shape[2]:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        import torch

        # `split` rather than slices: the gradient of a slice is as long as all rows together
        lengths = [length for length, _ in blocks]
        rows = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
        outputs = []
        for row, (_, mask) in zip(rows, blocks, strict=True):
            # a mask is dropped only if it was causal, whatever the module's default is
            options = kwargs | {"is_causal": True} if mask is None else kwargs
            outputs.append(sdpa_attention_forward(module, *row, mask, **options)[0])
        return torch.cat(outputs, dim=1), None

    def attend_in_float32(module, query, key, value, attention_mask, **kwargs):
        if query.device.type != "cpu" or query.dtype.itemsize > 4 or not module.training:
            return attend(module, query, key, value, attention_mask, **kwargs)
        import torch

        if "position_bias" in kwargs:
            kwargs["position_bias"] = _as_float32(kwargs["position_bias"])
        # in bf16 torch 2.13's backward pass compiles a kernel of megabytes for every length, and is slower;
        # autocast would cast float32 to bf16 again
        with torch.autocast("cpu", enabled=False):
            output = attend(module, *map(_as_float32, (query, key, value, attention_mask)), **kwargs)[0]
        return output.to(query.dtype), None

    AttentionInterface.register("sdpa", attend_in_float32)


def _as_float32(states):
    """Casts floating-point tensors, also a bias on the scores; a bool mask is returned as it is."""
    return states.float() if states is not None and states.is_floating_point() else states


def _blocks_of(mask) -> list[tuple]:
    """Returns the length and the mask of each row; None for a plain causal mask. Cached on the mask for all layers.

    `[[1,0,0], [1,1,0], [0,0,1]]` → `[(2, None), (1, None)]`

    Args:
        mask: bool of shape (1, 1, tokens, tokens), or any other mask, or None, which have no blocks.
    """
    import torch

    if torch.compiler.is_compiling() or mask is None or mask.dtype != torch.bool:
        return []
    if mask.shape[:2] != (1, 1) or mask.shape[2] != mask.shape[3]:
        return []
    if not hasattr(mask, "row_blocks"):
        mask.row_blocks = _find_blocks(mask)
    return mask.row_blocks


def _find_blocks(mask) -> list[tuple]:
    allowed = mask[0, 0]
    length = len(allowed)
    # a row begins with the token that does not see the one before it
    starts = [0, *((~allowed.diagonal(-1)).nonzero().flatten() + 1).tolist(), length]
    if mask.is_cuda and length < GPU_BLOCKS_FROM * (len(starts) - 1):
        return []
    blocks, within = [], 0
    for start, end in zip(starts, starts[1:], strict=False):
        block = mask[:, :, start:end, start:end]
        count = int(block.sum())
        within += count
        causal = count == (end - start) * (end - start + 1) // 2 and not block.triu(1).any()
        # a copy: a view and the mask would reference each other and never be freed
        blocks.append((end - start, None if causal else block.clone()))
    # if tokens attend across rows, the mask is not block-diagonal
    return blocks if within == int(allowed.sum()) else []
