"""Additions to TRL's trainer: complete checkpoints, resuming, NaN handling, evaluation by tokens.

In reading order: trainer, optimizers, checkpointing, nonfinite, callbacks, figures, eval_metrics, token_losses,
row_losses, row_ledger, filler, order, stream, neftune, plan, resume_rules, resume.
"""
