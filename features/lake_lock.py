"""One writer at a time in a folder of the lake; the kernel frees a dead holder's lock."""

from __future__ import annotations

import fcntl
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from features.errors import LakeBusyError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Held for one new file, a fraction of a second. A longer wait means its holder is stuck.
LOCK_NAME: Final = ".lock"
# Held while files are rewritten into a revision; new files may appear meanwhile.
REVISION_LOCK_NAME: Final = ".revision.lock"
LOCK_TIMEOUT_S: Final = 30.0
_LOCK_RETRY_S: Final = 0.01


@contextmanager
def locked(
    folder: Path, *, name: str = LOCK_NAME, timeout_s: float = LOCK_TIMEOUT_S
) -> Iterator[None]:
    """Hold the folder alone among those who ask for the same name.

    Raises:
        LakeBusyError: somebody has held it for `timeout_s`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("ab") as file:
        deadline = time.monotonic() + timeout_s
        while not _try_lock(file.fileno()):
            if time.monotonic() > deadline:
                raise LakeBusyError(
                    f"{folder} has been locked by another writer for {timeout_s:g} s. Find it with "
                    f"`fuser {folder / name}` and end it, or wait."
                )
            time.sleep(_LOCK_RETRY_S)
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
