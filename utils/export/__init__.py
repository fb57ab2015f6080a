"""Merging adapters into their base, and a Modelfile for Ollama.

In reading order: arguments, merge, tensors, merge_folder, modelfile.
"""
