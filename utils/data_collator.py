"""Rows → the tensors of a step."""


def build_collator(pad_token_id: int, padding_free: bool):
    """Makes the collator for rows of `input_ids` and `labels`.

    Padded, each row is filled up to the longest of the step:

        rows [1, 2, 3] and [4, 5], labels [-100, 2, 3] and [-100, 5]
        → input_ids      [[1, 2, 3], [4, 5, pad]]
          labels         [[-100, 2, 3], [-100, 5, -100]]
          attention_mask [[1, 1, 1], [1, 1, 0]]

    Padding-free, the rows stand end to end in one, and positions that start again at 0
    tell the attention where a row begins, so that none sees another:

        → input_ids    [[1, 2, 3, 4, 5]]
          labels       [[-100, 2, 3, -100, 5]]
          position_ids [[0, 1, 2, 0, 1]]

    A packed row brings `seq_lengths`, the lengths of the rows within it, and becomes
    positions in the same way. Both forms have the same loss and the same gradients.

    Args:
        pad_token_id: fills rows up; it is never trained, whatever token it is.
        padding_free: which of the two forms.

    Returns:
        TRL's `DataCollatorForLanguageModeling`, which also adds the row boundaries that
        flash attention's variable-length kernels take.
    """
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    return DataCollatorForLanguageModeling(pad_token_id=pad_token_id, padding_free=padding_free)
