"""Workarounds for other libraries, for the whole process or for one model.

Each one names the library's version it was written for; tests/patches/test_contracts.py checks that the replaced names
still exist, that results equal the library's own, and that the workaround is still needed. In reading order: attention,
rope, lm_head, layers, lazy_imports.
"""
