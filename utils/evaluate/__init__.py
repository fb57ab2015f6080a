"""Evaluation of one or several models on answers and on multiple choice.

In reading order: evaluate, models, methods, metrics, multiple_choice, report.
"""
