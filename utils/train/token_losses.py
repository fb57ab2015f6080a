"""Gives a step's extensions the log-probability of each token, before TRL reduces them to the loss."""

from utils.runtime.errors import Problem, UserError

# columns of a batch that are no inputs of the model and are read here
TOKEN_COLUMNS = ("loss_weights",)


class TokenLossMixin:
    """A mix-in for TRL's SFTTrainer: weights the losses of tokens, and hands them to `observe_tokens`.

    TRL 1.16 computes `log_probs`, [rows, length - 1] and 0 where nothing is trained, and from these the loss. With the
    weights w of a row's answers, which are 1 if it gives none, it is

        L = -Σ_t w_t log p(t) / number of trained tokens
    """

    def _prepare_inputs(self, inputs):
        inputs, columns = without_token_columns(inputs)  # DeepSpeed's dtype, to which transformers casts, is for states
        moved = {name: column.to(self.args.device) for name, column in columns.items()}
        return {**super()._prepare_inputs(inputs), **moved}

    def compute_loss(self, model, inputs, *args, **kwargs):
        inputs, columns = without_token_columns(inputs)
        if columns:
            check_weighted_loss(self.args)  # of streamed rows it was not known before

        def forward(**given):
            output = model(**given)
            if "fused_lm_head" in given:
                self.observe_tokens(output, given, columns)
            return output

        return super().compute_loss(forward, inputs, *args, **kwargs)

    def observe_tokens(self, output, inputs: dict, columns: dict) -> None:
        """Called with the output of each batch of training; here its log-probabilities are weighted.

        Args:
            output: TRL's FusedCausalLMOutput, [rows, length - 1] each.
            inputs: of the model.
            columns: those of TOKEN_COLUMNS that the batch has, [rows, length] each.
        """
        weigh(output, columns)


def without_token_columns(inputs: dict) -> tuple[dict, dict]:
    """Splits the columns of TOKEN_COLUMNS off a batch; returns the model's inputs, and these columns."""
    columns = {name: inputs[name] for name in TOKEN_COLUMNS if name in inputs}
    return {name: value for name, value in inputs.items() if name not in TOKEN_COLUMNS}, columns


def check_weighted_loss(train_args) -> None:
    """Refuses losses that TRL does not compute from each token's log-probability, or not from that alone.

    Raises:
        UserError: such a loss is set.
    """
    for name, value in (("loss_type", "nll"), ("label_smoothing_factor", 0.0)):
        if (given := getattr(train_args, name)) != value:
            raise UserError(
                Problem(
                    f"--{name} {given} does not weight the losses of tokens, and answers in the training data have a "
                    f"'weight'; use --{name} {value}, or remove the weights",
                    flags=(name,),
                )
            )


def weigh(output, columns: dict) -> None:
    """Multiplies the log-probabilities in TRL's output by the weights of their tokens, if the batch has any."""
    if "loss_weights" in columns:
        output.log_probs = output.log_probs * columns["loss_weights"][:, 1:]


def sequence_index(inputs: dict):
    """The number of each token's sequence in the batch, [rows, length].

    Rows laid end to end begin where position ids restart: `position_ids [[0, 1, 2, 0, 1]]` → `[[0, 0, 0, 1, 1]]`;
    of padded rows each is a sequence.
    """
    import torch

    ids = inputs["input_ids"]
    if "position_ids" in inputs:
        return (inputs["position_ids"] == 0).flatten().cumsum(0).view_as(ids) - 1
    return torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
