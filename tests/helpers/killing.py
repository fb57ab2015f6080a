"""Ends a process at its n-th chance: at a write, in the middle of one, or before an optimizer step.

    python tests/helpers/killing.py SIGKILL 12 main_train.py --max_steps 4 …      # SIGKILL at the twelfth chance
    python tests/helpers/killing.py count FILE main_train.py …                    # how many there are

Chances are counted, never timed, so that the same number is the same moment.
"""

import os
import signal
import sys
from pathlib import Path


class Chances:
    """Counts the chances of this process to die, and takes one.

    Args:
        folder: writes below it are chances.
        number: the chance to take; 0 for none.
        signums: what is sent to this process then.
    """

    def __init__(self, folder: Path, number: int, *signums: int):
        self.folder, self.number, self.signums, self.count = str(folder), number, signums, 0

    def install(self) -> None:
        import safetensors.torch
        import torch

        sys.addaudithook(self._heard)
        self._wrap(safetensors.torch, "serialize_file", lambda args: args[1])
        self._wrap(torch, "save", lambda args: args[1])
        step = torch.optim.AdamW.step

        def stepped(*args, **kwargs):
            self.chance()
            return step(*args, **kwargs)

        torch.optim.AdamW.step = stepped

    def chance(self, torn: str | None = None) -> None:
        self.count += 1
        if self.count == self.number:
            if torn:
                os.truncate(torn, os.path.getsize(torn) // 2)
            for signum in self.signums:
                os.kill(os.getpid(), signum)

    def _heard(self, event: str, args: tuple) -> None:
        if event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir") or not isinstance(
            args[0], str | Path
        ):
            return
        changes = event != "open" or (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR))
        if changes and str(args[0]).startswith(self.folder):
            self.chance()

    def _wrap(self, module, name: str, path_of) -> None:
        """Two chances more: before the write, and with half of it done."""
        write = getattr(module, name)

        def written(*args, **kwargs):
            path = path_of(args)
            self.chance()
            result = write(*args, **kwargs)
            if isinstance(path, str | Path) and str(path).startswith(self.folder):
                self.chance(torn=str(path))
            return result

        setattr(module, name, written)


def main() -> None:
    # DeepSpeed's launcher puts its own word before the others
    what, value, script, *argv = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    folder = Path(argv[argv.index("--output_dir") + 1]).resolve()
    sys.path.insert(0, str(Path(script).resolve().parent))
    import main_train
    from utils.runtime.command import run_command

    mine = os.environ.get("RANK", "0") == os.environ.get("KILL_RANK", "0")
    number = int(value) if what != "count" and mine else 0
    chances = Chances(folder, number, *([getattr(signal, what)] if number else []))
    chances.install()
    run_command(lambda: main_train.main(argv))
    if what == "count":
        Path(value).write_text(str(chances.count))


if __name__ == "__main__":
    main()
