"""What is wrong with a run before it starts.

In reading order: examine, quick, settings, resources, template, tokens, census, rows, findings, codes.
"""
