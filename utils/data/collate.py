"""Collators: prepared rows → the tensors of a step."""

from utils.template.tokenize import IGNORE_INDEX

# what collators add that is no input of the model
NOT_INPUTS = frozenset(
    ("labels", "loss_weights", "source", "row", "completion_mask", "ref_chosen_logps", "ref_rejected_logps")
)


def build_collator(pad_token_id: int, padding_free: bool):
    """Makes the collator for rows of `input_ids` and `labels`.

    Padded, each row is filled up to the longest of the step:

        rows [1, 2, 3] and [4, 5], labels [-100, 2, 3] and [-100, 5]
        → input_ids      [[1, 2, 3], [4, 5, pad]]
          labels         [[-100, 2, 3], [-100, 5, -100]]
          attention_mask [[1, 1, 1], [1, 1, 0]]

    Padding-free, the rows are concatenated, and position ids that restart at 0 mark where a row
    begins, so that rows do not attend to each other:

        → input_ids    [[1, 2, 3, 4, 5]]
          labels       [[-100, 2, 3, -100, 5]]
          position_ids [[0, 1, 2, 0, 1]]

    If a row has `loss_weights`, so has the step, in the same layout and 1 in rows without.

    A packed row has `seq_lengths`, the lengths of the rows within it, which become position ids in the same way.
    Both forms have the same loss and the same gradients.

    Args:
        pad_token_id: id of the padding; never trained, even if it is also another token.
        padding_free: whether rows are concatenated rather than padded.

    Returns:
        TRL's `DataCollatorForLanguageModeling`, which also adds the row boundaries for the variable-length kernels of
        flash attention, with the column `source` added.
    """
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collate = DataCollatorForLanguageModeling(pad_token_id=pad_token_id, padding_free=padding_free)
    return _with_sources(_with_weights(collate, padding_free))


def _with_weights(collate, padding_free: bool):
    """Adds the weights of the tokens' losses to a collator's output, as `labels` are laid out, if a row has any."""

    def collate_with_weights(rows: list[dict]) -> dict:
        given = [row.get("loss_weights") for row in rows]
        batch = collate([{name: value for name, value in row.items() if name != "loss_weights"} for row in rows])
        if all(weights is None for weights in given):
            return batch
        import torch
        from torch.nn.utils.rnn import pad_sequence

        parts = [
            torch.ones(len(row["input_ids"])) if weights is None else torch.tensor(weights)
            for row, weights in zip(rows, given, strict=True)
        ]
        whole = torch.cat(parts)[None] if padding_free else pad_sequence(parts, batch_first=True, padding_value=1.0)
        return {**batch, "loss_weights": whole}

    return collate_with_weights


def _with_sources(collate):
    """Adds `source` to a collator's output, so that a row that breaks the training can be named.

    It is a list of numbers as from `places.encode_source`, one of each sequence, in their order; the trainer removes it
    from the model's inputs. Rows without a source only fill up a step (utils/train/filler.py) and are dropped if there
    are others.
    """

    def collate_with_sources(rows: list[dict]) -> dict:
        if "source" not in rows[0]:
            return collate(rows)
        real = [row for row in rows if row["source"]] or rows[:1]
        return {**collate(real), "source": [source for row in real for source in row["source"]]}

    return collate_with_sources


def build_trl_pair_collator(pad_token_id: int):
    """Makes TRL's collator for pairs: prompt and chosen in the first half of the rows, rejected in the second.

        prompt_ids [1, 2], chosen_ids [3, 4], chosen_labels [3, 4], rejected_ids [5], rejected_labels [5]
        → input_ids       [[1, 2, 3, 4], [1, 2, 5, pad]]
          attention_mask  [[1, 1, 1, 1], [1, 1, 1, 0]]
          completion_mask [[0, 0, 1, 1], [0, 0, 1, 0]]

    TRL's own mask covers everything after the prompt. This one follows the labels: in an answer of several turns, those
    of the user or a tool are not trained.
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
    """Makes the collator of `dpo_single`: each pair becomes two rows, all chosen before all rejected ones.

        prompt_ids [1, 2], chosen_ids [3, 4], chosen_labels [3, 4], rejected_ids [5], rejected_labels [5]

    Padded:

        → input_ids      [[1, 2, 3, 4], [1, 2, 5, pad]]
          labels         [[-100, -100, 3, 4], [-100, -100, 5, -100]]
          attention_mask [[1, 1, 1, 1], [1, 1, 1, 0]]
          row            [[0, 0, 0, 0], [1, 1, 1, 1]]

    Padding-free, concatenated:

        → input_ids    [[1, 2, 3, 4, 1, 2, 5]]
          labels       [[-100, -100, 3, 4, -100, -100, 5]]
          position_ids [[0, 1, 2, 3, 0, 1, 2]]
          row          [[0, 0, 0, 0, 1, 1, 1]]

    `row` is the index of each token's row, by which the loss sums log-probabilities in either form. Precomputed
    log-probabilities of the reference model are passed through. The other tensors are as from `build_collator`.
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
