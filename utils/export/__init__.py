"""Merging an adapter into its base, and a Modelfile.

In reading order: merge_files, merge_folder, merge, modelfile.
"""
