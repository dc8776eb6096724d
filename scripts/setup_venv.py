"""Make the virtual environment that the Makefile uses, with a PyTorch that nothing installed later replaces.

Where the Python that runs this script can import a recent PyTorch (a CUDA build, say), the environment borrows it and
downloads none. Elsewhere one pinned version is installed. Either way its exact version is written to
``constraints.txt`` in the environment, for ``pip install -c``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 11)
VERSION_QUERY = "from importlib.metadata import version; print(version('torch'))"


def installed_torch() -> Path | None:
    """The folder that holds this Python's PyTorch; None where there is none or it is too old."""
    try:
        found = metadata.distribution("torch")
    except metadata.PackageNotFoundError:
        return None
    release = tuple(int(part) for part in found.version.split(".")[:2])
    if release < OLDEST_TORCH:
        print(f"torch {found.version} is older than {'.'.join(map(str, OLDEST_TORCH))}: another one is installed")
        return None
    return Path(str(found.locate_file(""))).resolve()


def main() -> None:
    """Create or complete the environment."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the environment is made")
    parser.add_argument("--torch", required=True, help="pip requirement to install where no PyTorch is at hand")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()

    if sys.version_info < OLDEST_PYTHON:
        needed = ".".join(map(str, OLDEST_PYTHON))
        raise SystemExit(f"python: {sys.version.split()[0]}; accepted: {needed} or later (make PYTHON=python{needed})")
    try:
        venv.create(folder, with_pip=True, symlinks=os.name != "nt")
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            "python: cannot make a virtual environment with pip; on Debian and Ubuntu: apt install python3-venv"
        ) from error
    python = folder / "bin" / "python"
    borrowed = installed_torch()
    if borrowed is None or folder in borrowed.parents:
        print(f"installing {arguments.torch}", flush=True)
        done = subprocess.run([python, "-m", "pip", "install", "--quiet", arguments.torch], check=False)
        if done.returncode != 0:
            raise SystemExit(f"torch: cannot install {arguments.torch!r} (make TORCH=torch==X.Y.Z for another version)")
    else:
        print(f"keeping the PyTorch in {borrowed}")
        # A path file rather than --system-site-packages, which would not reach an active virtual environment.
        site = next((folder / "lib").glob("python*/site-packages"))
        # The system's encoding, as Python before 3.13 reads these files.
        (site / "borrowed_torch.pth").write_text(f"{borrowed}\n", encoding="locale")
    version = subprocess.run([python, "-c", VERSION_QUERY], check=True, capture_output=True, text=True).stdout.strip()
    (folder / "constraints.txt").write_text(f"torch=={version}\n", encoding="utf-8")
    print(f"torch {version}")


if __name__ == "__main__":
    main()
