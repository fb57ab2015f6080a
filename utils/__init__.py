"""The rooms of LLM-Dojo, in the order the data passes through them.

log → errors → paths → segments → template_jinja → template_format → template_auto → template
→ data_files → check_adapter → check_args → check_dpo → check_run → precision → flags → args → tokenizer
→ data_report → data_rows → data_pairs → shorten → shorten_pairs → data_encode → data_process
→ data_collator → adapter → model → tasks → callbacks → plot → save → script

A module imports only from those before it; `tests/test_layout.py` holds that.
"""
