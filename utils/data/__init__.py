"""Files → raw rows → conversations → token ids and labels → batches.

In reading order: files, splits, json_rows, tables, fields, turns, conversations, pairs, row_types, encode, truncate,
parallel, places, report, cache, prepare, collate.
"""
