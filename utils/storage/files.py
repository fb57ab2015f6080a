"""Where the project lies, so that its samples are found from any folder."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def project_path(path: str) -> str:
    """A relative path as it stands, or below this project where only there it exists."""
    if path and not os.path.exists(path) and os.path.exists(ROOT / path):  # False where Path's would raise
        return str(ROOT / path)
    return path
