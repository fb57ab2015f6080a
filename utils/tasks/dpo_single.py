"""DPO written out in PyTorch: log-probabilities, reference and loss, to read and to change.

Rafailov et al., 2023, Direct Preference Optimization, arXiv 2305.18290. Everything else, from
the optimizer to the checkpoints, is TRL's DPOTrainer.
"""

from contextlib import nullcontext

import torch
from torch.nn.functional import cross_entropy, logsigmoid

from utils.data.collate import NOT_INPUTS, build_pair_collator
from utils.data.prepare import Data
from utils.model.head import keep_logits
from utils.tasks.dpo import pair_task
from utils.tasks.no_effect import NoEffect
from utils.template.tokenize import IGNORE_INDEX


def preference_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta: float):
    """Computes the loss of each pair; change the loss here.

    Args:
        policy_chosen, policy_rejected: log-probabilities log π(y|x) of the answers, [pairs].
        reference_chosen, reference_rejected: the same under the reference, log π_ref(y|x), [pairs].
        beta: how strongly the loss keeps the policy close to the reference.

    Returns:
        losses [pairs], and the implicit rewards of chosen and rejected, [pairs] each.
    """
    # r(x, y) = β log π(y|x) / π_ref(y|x)                 (equation 5, up to a term of x alone)
    chosen_rewards = beta * (policy_chosen - reference_chosen)
    rejected_rewards = beta * (policy_rejected - reference_rejected)
    # L = -log σ(r(x, y_chosen) - r(x, y_rejected))       (equation 7)
    losses = -logsigmoid(chosen_rewards - rejected_rewards)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def sequence_log_probs(model, batch: dict, **options):
    """Sums the log-probabilities of each row's trained tokens.

    Logits are computed only at positions that predict a trained token, since [rows, positions, vocabulary] of all
    positions would be by far the largest tensor of a step.

    Args:
        model: the policy or the reference.
        batch: from `build_pair_collator`.
        **options: for the model's forward.

    Returns:
        (log π(y|x) of each row, [2 pairs], chosen before rejected; the model's output)
    """
    inputs = {name: value for name, value in batch.items() if name not in NOT_INPUTS}
    targets = batch["labels"][:, 1:]  # the logits at t predict the token at t + 1
    places = (targets != IGNORE_INDEX).any(dim=0).nonzero().flatten()
    output = model(**inputs, use_cache=False, **keep_logits(model, places), **options)
    logits = output.logits if output.logits.shape[1] == len(places) else output.logits[:, places]
    # log π(y_t | x, y_<t) = log softmax(logits_t)[y_t]
    losses = cross_entropy(
        logits.flatten(0, 1).float(), targets[:, places].flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    rows = batch["row"][:, places].flatten()
    # log π(y|x) = Σ_t log π(y_t | x, y_<t)
    return losses.new_zeros(int(batch["row"][-1, -1]) + 1).index_add(0, rows, -losses), output


class WrittenOutLoss:
    """A mix-in for TRL's DPOTrainer: the loss of this file in place of TRL's."""

    own_forward = True  # `resolve_aux_loss` reads it: the auxiliary loss comes from the model's own forward pass

    def _compute_loss(self, model, inputs, return_outputs):
        options = {"output_router_logits": True} if self.aux_loss_enabled else {}
        log_probs, output = sequence_log_probs(model, inputs, **options)
        policy_chosen, policy_rejected = log_probs.chunk(2)
        if self.precompute_ref_logps:
            reference_chosen, reference_rejected = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            reference_chosen, reference_rejected = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
        losses, chosen_rewards, rejected_rewards = preference_loss(
            policy_chosen, policy_rejected, reference_chosen, reference_rejected, self.beta
        )
        self.add_pair_losses(losses)
        loss = losses.mean()
        if self.aux_loss_enabled:  # the load-balancing loss of a mixture of experts
            loss = loss + self.router_aux_loss_coef * output.aux_loss
        self._store_metrics(
            {
                "rewards/chosen": chosen_rewards,
                "rewards/rejected": rejected_rewards,
                "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
                "rewards/margins": chosen_rewards - rejected_rewards,
                "logps/chosen": policy_chosen.detach(),
                "logps/rejected": policy_rejected.detach(),
            }
        )
        return (loss, output) if return_outputs else loss

    def add_pair_losses(self, losses) -> None:
        """Called with the losses of each batch, [pairs]; `utils.train.row_losses` notes them by row."""

    def compute_ref_log_probs(self, model, inputs):
        """The reference's log-probabilities of chosen and rejected, [pairs] each, without gradients."""
        from trl.models.utils import disable_gradient_checkpointing
        from trl.trainer.utils import use_adapter

        unwrapped, adapter = self.accelerator.unwrap_model(self.model), nullcontext()
        if self.ref_model is None and hasattr(unwrapped, "peft_config"):
            # the copy of a loaded adapter; None, no adapter, if the policy started as the base
            adapter = use_adapter(unwrapped, adapter_name="ref" if "ref" in unwrapped.peft_config else None)
        no_checkpoints = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        with torch.no_grad(), no_checkpoints, adapter, self.accelerator.autocast():
            return sequence_log_probs(model, inputs)[0].chunk(2)

    def _store_metrics(self, figures: dict) -> None:
        """Adds means over all processes to the metrics that TRL logs."""
        mode = "train" if self.model.training else "eval"
        for name, values in figures.items():
            self._metrics[mode][name].append(self.accelerator.gather(values).mean().item())


def build_collator(args, train_args, tokenizer):
    """A collator that concatenates rows (`--padding_free true`) or pads them."""
    return build_pair_collator(tokenizer.pad_token_id, train_args.padding_free)


def build_trainer(args, train_args, model, adapter, data: Data, collator, tokenizer):
    """Builds TRL's DPOTrainer with the loss of this file."""
    from trl import DPOTrainer

    from utils.tasks.dpo_trainer import make_dpo_trainer

    class WrittenOutTrainer(WrittenOutLoss, DPOTrainer):
        pass

    return make_dpo_trainer(WrittenOutTrainer, args, train_args, model, adapter, data, collator, tokenizer)


_OF_TRL = {  # settings of TRL's loss → their defaults
    "loss_type": ["sigmoid"],
    "loss_weights": None,
    "label_smoothing": 0.0,
    "ld_alpha": None,
    "f_divergence_type": "reverse_kl",
    "use_weighting": False,
}
TASK = pair_task(
    "dpo_single",
    build_trainer,
    build_collator,
    supports_padding_free=True,
    notes_row_losses=True,
    settings_without_effect=(
        NoEffect(
            tuple(_OF_TRL),
            lambda s: True,
            "the loss of dpo_single is written out in utils/tasks/dpo_single.py",
            refused=_OF_TRL,
            flags=("task_type",),
            remedy="use --task_type dpo_multi, or change preference_loss there",
        ),
    ),
)
