"""Rows → the tensors of a step."""

from utils.template.tokenize import IGNORE_INDEX

# what a collator adds to the model's own inputs
NOT_INPUTS = frozenset(("labels", "source", "row", "completion_mask", "ref_chosen_logps", "ref_rejected_logps"))


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
        flash attention's variable-length kernels take, and `source`, the rows' places.
    """
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    return _with_sources(DataCollatorForLanguageModeling(pad_token_id=pad_token_id, padding_free=padding_free))


def _with_sources(collate):
    """The collator, which also says where the rows of a step come from, to name them if one breaks the training.

    `source` is a list of numbers from `places.encode_source`, not a tensor: no model sees it. Rows of no source only
    fill a step up (utils/train/filler.py), and are left out where there are others.
    """

    def collate_with_sources(rows: list[dict]) -> dict:
        if "source" not in rows[0]:
            return collate(rows)
        there = [row for row in rows if row["source"]] or rows[:1]
        return {**collate(there), "source": sorted({source for row in there for source in row["source"]})}

    return collate_with_sources


def build_trl_pair_collator(pad_token_id: int):
    """Makes TRL's collator for pairs: prompt and chosen in the first half of the rows, rejected in the second.

        prompt_ids [1, 2], chosen_ids [3, 4], chosen_labels [3, 4], rejected_ids [5], rejected_labels [5]
        → input_ids       [[1, 2, 3, 4], [1, 2, 5, pad]]
          attention_mask  [[1, 1, 1, 1], [1, 1, 1, 0]]
          completion_mask [[0, 0, 1, 1], [0, 0, 1, 0]]

    TRL counts everything after the prompt as the answer. The labels say better where an answer
    is of several turns: what a user or a tool says between them is not trained.
    """
    import torch
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    class Collator(DataCollatorForPreference):
        def torch_call(self, examples):
            batch = super().torch_call(examples)
            prompts = [example["prompt_ids"] for example in examples]
            labels = [example[side] for side in ("chosen_labels", "rejected_labels") for example in examples]
            for mask, prompt, row in zip(batch["completion_mask"], prompts * 2, labels, strict=True):
                mask[len(prompt) : len(prompt) + len(row)] = torch.tensor(row) != IGNORE_INDEX
            return batch

    return _with_sources(Collator(pad_token_id=pad_token_id))


def build_pair_collator(pad_token_id: int, padding_free: bool):
    """Makes the collator of `dpo_single`; each pair becomes two rows, all chosen before all rejected.

        prompt_ids [1, 2], chosen_ids [3, 4], chosen_labels [3, 4], rejected_ids [5], rejected_labels [5]

    Padded:

        → input_ids      [[1, 2, 3, 4], [1, 2, 5, pad]]
          labels         [[-100, -100, 3, 4], [-100, -100, 5, -100]]
          attention_mask [[1, 1, 1, 1], [1, 1, 1, 0]]
          row            [[0, 0, 0, 0], [1, 1, 1, 1]]

    Padding-free, end to end, told apart by positions that start again:

        → input_ids    [[1, 2, 3, 4, 1, 2, 5]]
          labels       [[-100, -100, 3, 4, -100, -100, 5]]
          position_ids [[0, 1, 2, 3, 0, 1, 2]]
          row          [[0, 0, 0, 0, 1, 1, 1]]

    `row` says to which row a token belongs, so that the loss can add up each row's
    log-probabilities in either form. Log-probabilities of a reference that were computed
    beforehand pass through. The inputs of the model are those of `build_collator`.
    """
    import torch
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    lay_out = DataCollatorForLanguageModeling(pad_token_id=pad_token_id, padding_free=padding_free)

    def collate(pairs: list[dict]) -> dict:
        rows = [
            {
                "input_ids": pair["prompt_ids"] + pair[f"{side}_ids"],
                "labels": [IGNORE_INDEX] * len(pair["prompt_ids"]) + pair[f"{side}_labels"],
            }
            for side in ("chosen", "rejected")
            for pair in pairs
        ]
        batch = lay_out(rows)
        numbers = torch.arange(len(rows))
        if padding_free:
            batch["row"] = numbers.repeat_interleave(torch.tensor([len(row["input_ids"]) for row in rows]))[None]
        else:
            batch["row"] = numbers[:, None].expand_as(batch["input_ids"])
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in pairs[0]:
                batch[name] = torch.tensor([pair[name] for pair in pairs])
        return batch

    return _with_sources(collate)
