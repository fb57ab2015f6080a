"""A trained model, loaded again: prompts → answers, and a conversation in the terminal.

In reading order: load, prompts, generate, answer_file, chat.
"""
