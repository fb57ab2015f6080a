"""Inference with a trained model: answers to the rows of files, and a chat in the terminal.

In reading order: load, batching, generate, prompts, answer_rows, answer_file, chat.
"""
