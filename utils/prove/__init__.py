"""Claims about a model and its rows, checked against plain PyTorch.

In reading order: registry, subject, batch_checks, model_checks, run_checks, plain, figures.
"""
