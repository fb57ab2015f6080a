"""What both modes of DPO share: the pairs, the reference, and how TRL's trainer gets them."""

import functools
from pathlib import Path

from utils.adapter import adapter_weights, settle_trainable
from utils.data_files import SUFFIXES
from utils.data_pairs import Pair, to_pair
from utils.data_rows import BadRow
from utils.errors import UserError
from utils.model import load_model
from utils.segments import answer_starts, count_answers
from utils.shorten_pairs import COLUMNS, encode_pairs_within
from utils.tasks.common import Data, for_trl, has_one_type, load_both, row_kind, survive
from utils.trainer import Surviving


def load_datasets(args, train_args, template, tokenizer) -> Data:
    """Prepares pairs: `prompt_ids`, and for each answer `…_ids` and `…_labels`."""

    def read(row) -> Pair:
        pair = to_pair(row)
        for side in ("chosen", "rejected"):
            _check_answers(template, pair["prompt"] + pair[side], count_answers(pair[side]))
        return pair

    lengths = {"max_prompt_length": args.max_prompt_length, "allow_special": args.allow_special_tokens_in_content}

    def encode(pairs: list[Pair]):
        truncate = args.overlong == "truncate"
        return encode_pairs_within(pairs, template, tokenizer, args.max_len, truncate=truncate, **lengths)

    key = {"task": "dpo", "template": repr(template), **lengths}
    kind = row_kind(args, train_args, tokenizer, None, SUFFIXES, read, encode, columns=COLUMNS, **key)
    return load_both(args, train_args, kind)


def _check_answers(template, messages: list[dict], answers: int) -> None:
    """A template must have a form for the conversation, and show each compared answer as it would be said."""
    try:
        template.check(messages)
        # the last one is always exact; a template may show those before it in another form
        if answers > 1 and len(answer_starts(list(template.segments(messages)))) < count_answers(messages):
            raise UserError("the template shows an earlier one of the answers in another form once a turn follows")
    except UserError as error:
        raise BadRow(error.problems[0]) from None


def make_trainer(trainer_class: type, args, train_args, model, adapter, data: Data, collator, tokenizer):
    """Builds a DPOTrainer on rows that are prepared already.

    The reference is what the policy is at the start:

    - under a new adapter, the same model with the adapter off
    - under an adapter that was trained before, a frozen copy of it, `ref`, on the same base
    - trained in full, a frozen copy of the model; none with `--precompute_ref_log_probs true`

    Args:
        trainer_class: TRL's DPOTrainer, or a class that extends it.
        args, train_args, model, adapter, data, collator, tokenizer: as in the task modules.
    """

    class Trainer(Surviving, trainer_class):
        def _prepare_dataset(self, dataset, *_):
            return dataset  # it is token ids already

        def _precompute_ref_logps(self, *inputs):
            settle(self)  # TRL comes here before its constructor ends
            try:
                return super()._precompute_ref_logps(*inputs)
            except pyarrow.ArrowInvalid:  # what was kept beside the rows is cut off
                for kept in Path(inputs[0].cache_files[0]["filename"]).parent.glob("cache-*.arrow"):
                    kept.unlink()
                return super()._precompute_ref_logps(*inputs)

        def _compute_loss(self, model, inputs, return_outputs):
            result = super()._compute_loss(model, inputs, return_outputs)
            _weigh_figures(self, inputs)
            return result

        def compute_ref_log_probs(self, model, inputs):
            return super().compute_ref_log_probs(model, {k: v for k, v in inputs.items() if k != "source"})

    import pyarrow
    from peft import get_peft_model

    if adapter is not None and args.init_lora_weights == "pissa":
        # PiSSA takes weight out of the base, which is not the reference any more with the adapter off
        model, adapter = get_peft_model(model, adapter), None
    start = adapter_weights(model)
    if start:
        # the copy is filled by settle_trainable; PiSSA's own start would take weight out of the base once more
        model.peft_config["default"].init_lora_weights = True

    def settle(trainer):
        settle_trainable(trainer.model, has_one_type(trainer, args), start)

    needs_copy = args.train_mode == "full" and not train_args.precompute_ref_log_probs
    try:
        trainer = Trainer(
            model=model,
            ref_model=load_model(args, train_args) if needs_copy else None,
            args=_settled(train_args, args, data),
            train_dataset=data.train,
            eval_dataset=data.eval,
            data_collator=collator,
            processing_class=tokenizer,
            peft_config=adapter,
        )
    except (ValueError, ImportError, NotImplementedError) as error:
        raise UserError(f"the trainer refuses the recipe's values: {error}") from error
    settle(trainer)
    survive(trainer, args, train_args, data)
    if start:
        # the reference can be had from the folder it came from
        save = trainer.model.save_pretrained
        trainer.model.save_pretrained = functools.partial(save, selected_adapters=["default"])
    return trainer


def _weigh_figures(trainer, inputs: dict) -> None:
    """Lets each pair count once in the figures: TRL takes the mean of batches, the last of which may be smaller."""
    if "completion_mask" in inputs:
        pairs = len(inputs["completion_mask"]) // 2
    else:
        pairs = (int(inputs["row"][-1, -1]) + 1) // 2
    figures = trainer._metrics["train" if trainer.model.training else "eval"]
    for name, values in figures.items():
        if name.startswith(("rewards/", "logps/")):
            values.extend([values[-1]] * (pairs - 1))


def _settled(train_args, args, data: Data):
    settled = for_trl(train_args)
    if settled.precompute_ref_log_probs:
        # TRL keeps log-probabilities by rows and weights alone, but they depend on these as well
        for dataset in filter(None, (data.train, data.eval)):
            dataset._fingerprint += f"-{args.precision}-{train_args.ld_alpha}"
    return settled
