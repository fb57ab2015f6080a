"""Claims about a model and its rows, checked against plain PyTorch.

In reading order: arguments, registry, subject, report, batch_checks, model_checks, run_checks, plain, figures.
"""
