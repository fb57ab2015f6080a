"""Every process-wide change to another library, one module each.

In reading order: attention, rope, lm_head, lazy_imports.
"""
