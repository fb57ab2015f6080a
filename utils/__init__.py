"""The rooms of LLM-Dojo, in the order the data passes through them.

errors → template → args → tokenizer → data_files → data_rows → data_process
→ data_collator → model → adapter → tasks → save → script

A module imports only from those before it; `tests/test_layout.py` holds that.
"""
