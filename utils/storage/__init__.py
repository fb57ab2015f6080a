"""Files, weights, checkpoints and the run folder with its lock.

In reading order: files, weights, run_folder, run_files, run_lock, pickles.
"""
