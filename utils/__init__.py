"""The rooms of LLM-Dojo.

`tests/test_layout.py` lists the modules in the order the data passes through them; a module imports only from those
before it.
"""
