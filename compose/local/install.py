"""Unpack tritonserver's wheel for the local stack: `python -m compose.local.install`.

Done already: nothing happens. Interrupted at any moment: the next run starts over, because the
wheel is unpacked under another name and renamed when it is whole.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from compose.errors import (
    ComposeError,
    InstallFailedError,
    StackBusyError,
    WheelMissingError,
)
from compose.local import triton
from compose.local.host import libpython_folder, require_triton_host
from compose.local.interrupts import interrupts
from compose.local.state import locked

if TYPE_CHECKING:
    from collections.abc import Iterator

_LOCK_WAIT_S = 900.0  # another install may be downloading over a slow line
_DRAFT_PREFIX = ".unpacking-"


def install(home: Path) -> bool:
    """Have the wheel unpacked at `home`; return whether anything had to be done.

    Raises:
        UnsupportedPlatformError: this machine could not run it.
        InstallFailedError: pip failed; `home` is as it was before.
    """
    require_triton_host()
    libpython_folder()
    home = home.absolute()
    home.parent.mkdir(parents=True, exist_ok=True)
    with _alone(home.parent):
        for draft in home.parent.glob(f"{_DRAFT_PREFIX}*"):  # of a run that was killed
            shutil.rmtree(draft)
        if _is_whole(home):
            return False
        with _draft(home.parent) as draft:
            unpacked = draft / "new"
            _unpack(unpacked)
            if home.exists():  # another version, or something else's remains
                home.rename(draft / "old")
            unpacked.rename(home)
    return True


def main() -> int:
    """Install for the command line; every refusal is one sentence on stderr and exit code 1."""
    parser = argparse.ArgumentParser(prog=triton.INSTALL_COMMAND, description=__doc__)
    parser.add_argument("--home", type=Path, default=triton.default_home())
    home: Path = parser.parse_args().home
    try:
        with interrupts():
            done = install(home)
    except ComposeError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stderr.write(f"{triton.WHEEL} {'is now' if done else 'was already'} in {home}\n")
    return 0


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    try:
        with locked(folder, wait_s=_LOCK_WAIT_S):
            yield
    except StackBusyError as error:
        reason = f"another install has been at work in {folder} for {_LOCK_WAIT_S:g} s"
        raise InstallFailedError(
            triton.WHEEL, reason=reason, next_command=triton.INSTALL_COMMAND
        ) from error


@contextmanager
def _draft(parent: Path) -> Iterator[Path]:
    """A folder on the same file system that is gone afterwards."""
    draft = Path(tempfile.mkdtemp(prefix=_DRAFT_PREFIX, dir=parent))
    try:
        yield draft
    finally:
        shutil.rmtree(draft)


def _is_whole(home: Path) -> bool:
    """Whether this very version lies there, as pip and the rename left it."""
    name, _, version = triton.WHEEL.partition("==")
    return (home / f"{name.replace('-', '_')}-{version}.dist-info").is_dir() and (
        home / "pytriton" / "tritonserver" / "bin" / "tritonserver"
    ).is_file()


def _unpack(target: Path) -> None:
    if find_spec("pip") is None:
        raise WheelMissingError(
            "pip", looked_in="no module pip", next_command=f"{sys.executable} -m ensurepip"
        )
    options = ["--no-deps", "--only-binary=:all:", "--no-compile", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target)]
    # pip's own progress bar goes to stderr, so that stdout stays free for answers.
    done = subprocess.run([*command, triton.WHEEL], stdout=sys.stderr.fileno(), check=False)
    if done.returncode:
        reason = f"pip ended with exit code {done.returncode}, its reason is above"
        raise InstallFailedError(triton.WHEEL, reason=reason, next_command=triton.INSTALL_COMMAND)


if __name__ == "__main__":
    sys.exit(main())
