"""NEFTune: noise on the embeddings in training, scaled by each row's own length."""


def add_noise(trainer) -> None:
    """Adds the noise of `--neftune_noise_alpha` to the input embeddings, in place of transformers' hook.

    NEFTune (arXiv 2310.05914, algorithm 1) adds ε · alpha / √(L d), ε uniform in [-1, 1), to the embeddings of a row of
    L tokens and d dimensions. transformers 5.23 uses the width of the batch as L: the longest of padded rows, or the
    sum of concatenated rows, so that the noise would depend on the batch. Here L is each row's length without padding,
    in both layouts, and padding gets no noise.

    Args:
        trainer: transformers' Trainer, before it trains.
    """
    alpha, trainer.neftune_noise_alpha = trainer.neftune_noise_alpha, None
    if not alpha:
        return
    seen: dict = {}

    def keep_inputs(model, args, kwargs):
        seen.update(mask=kwargs.get("attention_mask"), positions=kwargs.get("position_ids"))

    def add(module, args, output):
        if not module.training:
            return output
        lengths = row_lengths(output.shape[:2], seen.get("mask"), seen.get("positions")).to(output.device)
        bound = alpha / (lengths.clamp(min=1) * output.shape[-1]).sqrt() * (lengths > 0)
        return output + output.new_empty(output.shape).uniform_(-1, 1) * bound[..., None].to(output.dtype)

    trainer.model.register_forward_pre_hook(keep_inputs, with_kwargs=True)
    trainer.model.get_input_embeddings().register_forward_hook(add)


def row_lengths(shape, mask, positions):
    """The length of the row that each token of a batch belongs to.

        positions [[0, 1, 2, 0, 1]] → [[3, 3, 3, 2, 2]]
        mask [[1, 1, 1], [1, 1, 0]] → [[3, 3, 3], [2, 2, 0]]

    Args:
        shape: (batch, tokens).
        mask: 1 for tokens and 0 for padding, [batch, tokens]; None without padding.
        positions: position ids, 0 at the start of each row, [batch, tokens]; None if each sequence is one row.

    Returns:
        float tensor [batch, tokens], 0 for padding.
    """
    import torch

    real = torch.ones(shape) if mask is None or mask.shape != shape else mask.float().cpu()
    if positions is None or positions.shape != shape:
        rows = torch.zeros(shape, dtype=torch.long)
    else:
        rows = (positions.cpu() == 0).cumsum(dim=1)
    counts = torch.zeros(shape[0], shape[1] + 1).scatter_add_(1, rows, real)
    return counts.gather(1, rows) * real
