"""Finds what is wrong with a run before it starts.

In reading order: examine, settings, resources, template, tokens, census, rows, findings, codes.
"""
