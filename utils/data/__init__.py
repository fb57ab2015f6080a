"""Files → raw rows → conversations → token ids and labels → batches.

In reading order: files, source_names, splits, json_rows, tables, formats, columns, fields, bad_rows, turns,
conversations, pairs, row_type, row_types, encode, truncate, parallel, packing, places, lengths, report, cache,
stream_index, stream, prepare, sources, mixture, curriculum, load_sources, collate.
"""
