"""Writing back: a thread that brings entries to the lower tiers, sooner or later."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Collection

from kvrag.errors import StoreError
from kvrag.store.journal import Journal
from kvrag.store.traffic import Traffic

logger = logging.getLogger(__name__)

_FIRST_RETRY, _LAST_RETRY = 1.0, 60.0
_PATIENCE = 2.0


class Uploads:
    """Works through a journal's pending entries in a thread of its own, which runs only while there are any.

    A tier that fails is left alone for a while, one second and then twice as long each time up to a minute;
    everything that it did not get stays pending, also beyond this process.

    Args:
        journal: what is pending.
        upload: brings one entry to one tier; False if the tier could not take it now.
        traffic: reads that go first.
        tiers: names of those that can be brought something; what others wait for is left alone.
    """

    def __init__(
        self,
        journal: Journal,
        upload: Callable[[str, str], bool],
        traffic: Traffic,
        tiers: Collection[str],
    ) -> None:
        self._journal, self._upload, self._traffic = journal, upload, traffic
        self._tiers = frozenset(tiers)
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._rounds = 0  # that were begun
        self._finished = 0  # that are over
        self._done = 0  # uploads
        self._delays: dict[str, float] = {}
        self._next_try: dict[str, float] = {}

    def pending(self) -> list[tuple[str, str]]:
        """Ids and the tiers that wait for them."""
        return [(key_id, tier) for key_id, tier in self._journal.pending() if tier in self._tiers]

    def wake(self) -> None:
        """Something may be pending."""
        with self._changed:
            self._stopping = False
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="kvrag-uploads", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self, timeout_seconds: float | None = None) -> int:
        """Try everything that is pending once, now; how many uploads are pending after that.

        Args:
            timeout_seconds: how long to wait at most.
        """
        if not self.pending():
            return 0
        end = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        with self._changed:
            self._next_try.clear()
            target = self._rounds + 1  # one that begins after this call
        self.wake()
        with self._changed:
            while self._finished < target and self._thread is not None:
                left = None if end is None else end - time.monotonic()
                if left is not None and left <= 0:
                    break
                self._changed.wait(left)
        return len(self.pending())

    def wait_for_one(self, timeout_seconds: float) -> bool:
        """Wait until one more upload is done.

        Args:
            timeout_seconds: how long at most.

        Returns:
            False: none was. At once where none is under way to a tier that can be reached.
        """
        end = time.monotonic() + timeout_seconds
        with self._changed:
            before = self._done
            while self._done == before:
                left = end - time.monotonic()
                if left <= 0 or self._thread is None or not self._can_go_on():
                    return False
                self._changed.wait(left)
            return True

    def _can_go_on(self) -> bool:
        """Whether something is pending for a tier that is not left alone."""
        now = time.monotonic()
        return any(self._next_try.get(tier, 0.0) <= now for _, tier in self.pending())

    def close(self, timeout_seconds: float) -> None:
        """Stop after the upload under way, or leave it to itself after so long; what is pending stays so."""
        with self._changed:
            thread, self._stopping = self._thread, True
            self._changed.notify_all()
        if thread is not None:
            thread.join(timeout_seconds)

    def _run(self) -> None:
        try:
            while self._wait():
                self._round()
        except (sqlite3.Error, StoreError) as error:
            logger.warning("uploads pause until the next put: %s", error)
        finally:
            with self._changed:
                if self._thread is threading.current_thread():
                    self._thread = None
                self._changed.notify_all()

    def _wait(self) -> bool:
        """Wait until a tier is to be tried; False when the thread may end: stopped, or nothing is pending."""
        with self._changed:
            while not self._stopping:
                tiers = {tier for _, tier in self.pending()}
                if not tiers:
                    self._thread = None  # a put from now on starts another one
                    return False
                wait = min(self._next_try.get(tier, 0.0) for tier in tiers) - time.monotonic()
                if wait <= 0:
                    self._rounds += 1
                    return True
                self._changed.wait(wait)
            return False

    def _round(self) -> None:
        """Try every pending entry whose tier is not known to be out of reach."""
        try:
            for key_id, tier in self.pending():
                if self._stopping:
                    break
                if self._next_try.get(tier, 0.0) > time.monotonic():
                    continue
                self._traffic.give_way(_PATIENCE)
                self._note(tier, self._upload(key_id, tier))
        finally:
            with self._changed:
                self._finished = self._rounds
                self._changed.notify_all()

    def _note(self, tier: str, worked: bool) -> None:
        with self._changed:
            if worked:
                self._delays.pop(tier, None)
                self._next_try.pop(tier, None)
                self._done += 1
            else:
                delay = min(2 * self._delays.get(tier, _FIRST_RETRY / 2), _LAST_RETRY)
                self._delays[tier], self._next_try[tier] = delay, time.monotonic() + delay
            self._changed.notify_all()
        if worked:
            return
        logger.warning("%s cannot be written to now; uploads wait for %.0f s", tier, delay)
