"""Errors, logging, processes and text formatting, which every other package may use.

In reading order: errors, command, log, distributed, environment, startup, text.
"""
