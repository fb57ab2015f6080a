"""Files and folders: hashes, weights, checkpoints, what a run wrote, who holds its folder.

In reading order: files, weights, run_folder, run_files, run_lock, pickles.
"""
