"""Errors, processes, logging: what every other package may use.

In reading order: errors, command, log, distributed, environment, startup, markdown.
"""
