"""A lease in Redis: one holder at a time, as long as it says that it lives.

It saves work, no more. A holder that stands still for longer than the lease lasts does not know
that another one has begun, so what must not be done twice needs a fencing token beside it.
"""

from __future__ import annotations

import logging
import threading
import time
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Final, Self

from features.errors import LeaseLostError, StoreError
from features.redis_client import execute, mapped_errors, run_script

if TYPE_CHECKING:
    from types import TracebackType

    from features.redis_client import RedisClient

log = logging.getLogger("moveline.lease")

# How long a holder that died keeps others out, and how long one may stand still.
LEASE_S: Final = 30.0
# Renewals within a lease: two may fail before it is lost.
_RENEWALS: Final = 3
# Between two attempts of one that waits for it.
_ASK_AGAIN_S: Final = 0.05


@cache
def _script(name: str) -> bytes:
    return files("features").joinpath(f"lua/{name}.lua").read_bytes()


class Lease:
    """A lease that this process holds; a thread renews it until it is released.

    Use `take`, and the lease as a context: it is released at the end of the block.
    """

    def __init__(self, client: RedisClient, key: str, *, owner: str, lease_s: float) -> None:
        self._client = client
        self._key = key
        self._owner = owner
        self._lease_s = lease_s
        self._held_until_s = 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, name=f"lease {key}", daemon=True)

    @classmethod
    def take(
        cls,
        client: RedisClient,
        key: str,
        *,
        owner: str,
        lease_s: float = LEASE_S,
        wait_s: float = 0.0,
    ) -> Self | None:
        """Return the lease, None if somebody else holds it.

        Args:
            client: where it is kept.
            key: names it.
            owner: who takes it; no two takers have the same name.
            lease_s: seconds it lasts without being renewed.
            wait_s: seconds for which whoever holds it may still give it back.

        Raises:
            StoreError: Redis did not answer.
        """
        lease = cls(client, key, owner=owner, lease_s=lease_s)
        until_s = time.monotonic() + wait_s
        while not lease._taken():
            if time.monotonic() >= until_s:
                return None
            time.sleep(_ASK_AGAIN_S)
        lease._thread.start()
        return lease

    def _taken(self) -> bool:
        asked_s = time.monotonic()
        with mapped_errors(f"taking {self._key}"):
            duration_ms = round(self._lease_s * 1000)
            taken = execute(self._client, "SET", self._key, self._owner, "NX", "PX", duration_ms)
        if taken:
            self._held_until_s = asked_s + self._lease_s
        return bool(taken)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    @property
    def is_held(self) -> bool:
        """Return whether nobody else can hold it at this moment, by this process's own clock."""
        return time.monotonic() < self._held_until_s

    def check(self) -> None:
        """Return if the lease is held.

        Raises:
            LeaseLostError: it ended, or somebody else has it.
        """
        if not self.is_held:
            raise LeaseLostError(
                f"{self._key} was lost: this process stood still for more than {self._lease_s:g} "
                "s, or Redis was away or emptied. Somebody else may hold it now; try again."
            )

    def release(self) -> None:
        """The lease is free, if it was held; a Redis that is away lets it end by itself."""
        self._end.set()
        self._thread.join()
        if not self.is_held:
            return
        self._held_until_s = 0.0
        try:
            with mapped_errors(f"releasing {self._key}"):
                run_script(self._client, _script("release_lease"), [self._key], [self._owner])
        except StoreError as error:
            log.warning("%s ends by itself within %g s: %s", self._key, self._lease_s, error)

    def _renew(self) -> None:
        while not self._end.wait(self._lease_s / _RENEWALS):
            asked_s = time.monotonic()
            args = [self._owner, round(self._lease_s * 1000)]
            try:
                with mapped_errors(f"renewing {self._key}"):
                    held = run_script(self._client, _script("renew_lease"), [self._key], args)
            except StoreError as error:
                log.warning("%s was not renewed: %s", self._key, error)
                continue
            if not held:
                self._held_until_s = 0.0
                log.warning("%s was lost", self._key)
                return
            self._held_until_s = asked_s + self._lease_s


def holder(client: RedisClient, key: str) -> str | None:
    """Return who holds a lease, None if nobody does.

    Raises:
        StoreError: Redis did not answer.
    """
    with mapped_errors(f"reading {key}"):
        name = execute(client, "GET", key)
    return None if name is None else name.decode()
