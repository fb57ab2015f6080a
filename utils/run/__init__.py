"""A run's folder, from its first line to its card.

In reading order: save, record, samples, plot, summary, card, compare.
"""
