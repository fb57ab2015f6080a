"""Files → raw rows → conversations → token ids and labels → batches.

In reading order: files, splits, json_rows, tables, nulls, fields, turns, conversations, pairs, encode, truncate,
truncate_pairs, report, keys, prepare, collate.
"""
