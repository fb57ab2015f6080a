"""The rooms of LLM-Dojo, in the order the data passes through them.

log → launch → errors → paths → weight_files → checkpoints → segments → template_jinja → template_format →
template_auto → template → data_files → check_adapter → check_args → check_deepspeed → check_dpo → check_run →
precision → flags → recipe → args → tokenizer → data_report → data_rows → data_pairs → shorten → shorten_pairs →
data_encode → data_process → data_collator → adapter → model → trained → generate → resume → trainer → tasks →
callbacks → plot → save → script

A module imports only from those before it; `tests/test_layout.py` holds that.
"""
