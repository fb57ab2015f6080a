"""The rooms of LLM-Dojo, in the order the data passes through them.

log → launch → errors → paths → weight_files → checkpoints → segments → template_jinja → template_go → template_format
→ template_auto → template → data_fields → data_json → data_tables → data_splits → data_files → check_adapter →
check_args → check_deepspeed → check_dpo → check_evaluation → check_run → precision → flags → recipe → record →
config_file → args → tokenizer → modelfile → data_report → data_rows → data_pairs → prompts → shorten → shorten_pairs
→ data_encode → data_process → data_collator → model_parts → adapter_targets → adapter → model → trained → merge →
base_generation → generate → answers → chat → metrics → choices → contenders → assess → assess_report → resume → head
→ trainer → evaluation → neftune → pissa → tasks → callbacks → plot → samples → card → summary → save → script

A module imports only from those before it; `tests/test_layout.py` holds that.
"""
