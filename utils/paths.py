"""Where the project lies, so that its samples are found from any folder."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def project_path(path: str) -> str:
    """A relative path as it stands, or below this project where only there it exists."""
    if not Path(path).exists() and (ROOT / path).exists():
        return str(ROOT / path)
    return path
