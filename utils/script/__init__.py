"""Commands a user runs: `python -m utils.script.<name> --help`."""
