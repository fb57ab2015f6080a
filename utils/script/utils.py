"""Makes `python utils/script/doctor.py` work as `python -m utils.script.doctor` does.

Python looks for imports beside a script that is started by its path, and so takes this file for the package `utils`.
It puts the project's folder in place of the script's and imports the package, which takes over its name.
"""

import sys
from pathlib import Path

if __name__ == "utils":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    del sys.modules["utils"]
    import utils  # noqa: F401
