"""LLM-Dojo's packages, in the order in which they may import each other; `tests/test_layout.py` holds them to it.

runtime, patches, storage   errors, processes, changes to other libraries, files
template, data, model       a chat format, rows → batches, weights and adapters
config                      flags and recipes → checked arguments
train, infer, memory        the trainer, answers, how much memory a run takes
tasks                       one file a task: sft, pretrain, dpo_multi, dpo_single
run, evaluate, export       a run's folder, scores, merged weights
args                        the defaults a user edits, and parse_args
doctor, explain, prove      before a training
script                      the commands
"""
