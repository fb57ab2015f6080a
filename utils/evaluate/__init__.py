"""Scores of answers and of multiple choice, for one model or several.

In reading order: metrics, multiple_choice, methods, models, report.
"""
