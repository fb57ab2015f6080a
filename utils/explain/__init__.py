"""What a run will do: every value and where it comes from, steps, tokens.

In reading order: explain, report, unused, diff.
"""
