"""What a store knows of its entries without looking at their files: one SQLite table, derived from them.

The files are the truth: an entry exists if and only if its manifest does. The index answers how many there
are, how large, and which go first when the store is full, in a time that does not depend on their number.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvrag.store.base import EntryInfo
from kvrag.store.clock import StoreClock
from kvrag.store.eviction import Use, eviction_named
from kvrag.store.index_file import Unbuilt, connect

APPLICATION_ID = 0x6B767267  # "kvrg"
VERSION = 1
PAGE = 500
_ALL = ""

_SCHEMA = """
CREATE TABLE entries (
    id TEXT PRIMARY KEY NOT NULL, tenant TEXT NOT NULL, num_bytes INTEGER NOT NULL,
    num_tokens INTEGER NOT NULL, created REAL NOT NULL, hits INTEGER NOT NULL, clock INTEGER NOT NULL,
    cost_seconds REAL NOT NULL, priority REAL NOT NULL, expires REAL, pinned INTEGER NOT NULL
);
CREATE INDEX by_priority ON entries (priority) WHERE NOT pinned;
CREATE INDEX by_tenant ON entries (tenant, priority) WHERE NOT pinned;
CREATE INDEX by_name ON entries (tenant, id);
CREATE INDEX by_end ON entries (expires) WHERE expires IS NOT NULL;
CREATE TABLE totals (
    scope TEXT PRIMARY KEY NOT NULL, entries INTEGER NOT NULL, num_bytes INTEGER NOT NULL,
    pinned_bytes INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE meta (name TEXT PRIMARY KEY NOT NULL, value NOT NULL) WITHOUT ROWID;
CREATE TABLE pending (id TEXT PRIMARY KEY NOT NULL) WITHOUT ROWID;
INSERT INTO totals VALUES ('', 0, 0, 0);
INSERT INTO meta VALUES ('clock', 0), ('floor', 0.0), ('wall', 0.0), ('ahead', 0.0), ('eviction', '');
CREATE TRIGGER added AFTER INSERT ON entries BEGIN
    INSERT OR IGNORE INTO totals VALUES ('t' || new.tenant, 0, 0, 0);
    UPDATE totals SET entries = entries + 1, num_bytes = num_bytes + new.num_bytes,
        pinned_bytes = pinned_bytes + new.pinned * new.num_bytes WHERE scope IN ('', 't' || new.tenant);
END;
CREATE TRIGGER changed AFTER UPDATE OF num_bytes, pinned ON entries BEGIN
    UPDATE totals SET num_bytes = num_bytes + new.num_bytes - old.num_bytes,
        pinned_bytes = pinned_bytes + new.pinned * new.num_bytes - old.pinned * old.num_bytes
        WHERE scope IN ('', 't' || old.tenant);
END;
CREATE TRIGGER removed AFTER DELETE ON entries BEGIN
    UPDATE totals SET entries = entries - 1, num_bytes = num_bytes - old.num_bytes,
        pinned_bytes = pinned_bytes - old.pinned * old.num_bytes WHERE scope IN ('', 't' || old.tenant);
    DELETE FROM totals WHERE scope = 't' || old.tenant AND entries = 0;
END;
"""
_INFO = "SELECT id, tenant, num_bytes, num_tokens, created, hits, cost_seconds, expires, pinned FROM entries "
_CANDIDATES = "SELECT id, num_bytes, priority FROM entries WHERE NOT pinned "
# What is put again keeps its hits. The tenant is part of the name: it cannot change.
_PUT = """
INSERT INTO entries VALUES (
    :id, :tenant, :num_bytes, :num_tokens, :created, :hits, :clock, :cost,
    score(:hits + 1, :num_bytes, :cost, :clock, :floor), :expires, :pinned
) ON CONFLICT (id) DO UPDATE SET
    num_bytes = :num_bytes, num_tokens = :num_tokens, created = :created, cost_seconds = :cost,
    expires = :expires, pinned = :pinned, priority = score(hits + 1, :num_bytes, :cost, clock, :floor)
"""
_HIT = """
UPDATE entries SET hits = hits + :n, clock = :clock,
    priority = score(hits + :n + 1, num_bytes, cost_seconds, :clock, :floor) WHERE id = :id
"""


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over all entries, or those of a tenant."""

    entries: int
    num_bytes: int
    pinned_bytes: int


@dataclass(frozen=True, slots=True)
class Victim:
    """An entry that may be evicted."""

    id: str
    num_bytes: int
    priority: float


class EntryIndex:
    """The open index of one store; the caller sees to it that one thread at a time uses it.

    Args:
        path: the file.
        eviction: name of the policy that gives the entries' priorities.
        build: start over with these entries, in a file that is empty or new.
        read_only: the file cannot be written to.

    Raises:
        Unbuilt: it is not, or not yet, an index of this version.
        sqlite3.Error: it is damaged, or cannot be opened.
    """

    def __init__(
        self,
        path: Path,
        eviction: str,
        *,
        build: Iterable[EntryInfo] | None = None,
        read_only: bool = False,
    ) -> None:
        priority = eviction_named(eviction)

        def score(hits: int, num_bytes: int, cost: float, clock: int, floor: float) -> float:
            return float(priority(Use(hits, max(1, num_bytes), cost, clock, floor)))

        self._eviction = eviction
        self._db = connect(path, read_only=read_only)
        try:
            self._db.create_function("score", 5, score, deterministic=True)
            if build is not None:
                self._build(build)
            self._check_version()
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def __del__(self) -> None:
        if hasattr(self, "_db"):
            self._db.close()

    # --- reading ---

    def totals(self, tenant: str | None = None) -> Totals:
        """Sums of all entries, or of one tenant's."""
        scope = _ALL if tenant is None else "t" + tenant
        row = self._db.execute(
            "SELECT entries, num_bytes, pinned_bytes FROM totals WHERE scope = ?", (scope,)
        ).fetchone()
        if row is None:
            return Totals(0, 0, 0)
        if not all(isinstance(number, int) for number in row):
            raise Unbuilt("its sums are no numbers")
        return Totals(*row)

    def info(self, key_id: str) -> EntryInfo | None:
        """One entry."""
        row = self._db.execute(_INFO + "WHERE id = ?", (key_id,)).fetchone()
        return _info(row) if row else None

    def page(self, after: str, tenant: str | None) -> list[EntryInfo]:
        """The next entries in the order of their ids; empty at the end."""
        if tenant is None:
            rows = self._db.execute(_INFO + "WHERE id > ? ORDER BY id LIMIT ?", (after, PAGE))
        else:
            query = _INFO + "WHERE tenant = ? AND id > ? ORDER BY id LIMIT ?"
            rows = self._db.execute(query, (tenant, after, PAGE))
        return [_info(row) for row in rows]

    def sizes(self, prefix: str) -> dict[str, int]:
        """Ids that begin with these two hex digits, with their bytes."""
        query = "SELECT id, num_bytes FROM entries WHERE id >= ? AND id < ?"
        return dict(self._db.execute(query, (prefix, prefix + "g")))

    def prefixes(self) -> list[str]:
        """First two digits of all ids, each once; a look-up for each of them, not for each id."""
        found: list[str] = []
        query = "SELECT min(id) FROM entries WHERE id >= ?"
        while row := self._db.execute(query, (found[-1] + "g" if found else "",)).fetchone()[0]:
            found.append(row[:2])
        return found

    def expired(self, now: float) -> list[str]:
        """Ids of entries whose time to live is over."""
        return [row[0] for row in self._db.execute("SELECT id FROM entries WHERE expires <= ?", (now,))]

    def cheapest(self, tenant: str | None, now: float) -> Generator[Victim, None, None]:
        """Entries that are not pinned: first those whose time is over, then the lowest priority first.

        Args:
            tenant: of its entries only; None: of all.
            now: seconds since 1970.
        """
        of, values = ("AND tenant = ? ", (tenant,)) if tenant is not None else ("", ())
        ended = self._db.execute(_CANDIDATES + of + "AND expires <= ?", (*values, now)).fetchall()
        yield from (Victim(key, size, 0.0) for key, size, _ in ended)
        gone = {row[0] for row in ended}
        for row in self._db.execute(_CANDIDATES + of + "ORDER BY priority", values):
            if row[0] not in gone:
                yield Victim(*row)

    def pending(self) -> list[str]:
        """Ids that somebody began to change; with the store locked by us: and died before the end."""
        return [row[0] for row in self._db.execute("SELECT id FROM pending")]

    def clock_state(self) -> tuple[float, float]:
        """What `StoreClock.merge` takes."""
        return float(self._meta("wall")), float(self._meta("ahead"))

    def wrong_sums(self) -> bool:
        """Whether the file is damaged, or the kept sums are not those of the rows; reads all of them."""
        if self._db.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
            return True
        sums = "count(*), coalesce(sum(num_bytes), 0), coalesce(sum(num_bytes * pinned), 0) FROM entries"
        query = f"SELECT '', {sums} UNION ALL SELECT 't' || tenant, {sums} GROUP BY tenant ORDER BY 1"
        return (
            self._db.execute(query).fetchall()
            != self._db.execute("SELECT * FROM totals ORDER BY 1").fetchall()
        )

    # --- changing: one transaction each ---

    def begin(self, key_ids: Sequence[str], floor: float = 0.0) -> None:
        """Note that these entries' files are going to change.

        Args:
            key_ids: of the entries.
            floor: highest priority of those that are evicted: newcomers start from it.
        """
        with self._transaction():
            self._db.execute("UPDATE meta SET value = max(value, ?) WHERE name = 'floor'", (floor,))
            self._db.executemany("INSERT OR IGNORE INTO pending VALUES (?)", [(key,) for key in key_ids])

    def finish(self, there: Iterable[EntryInfo], gone: Sequence[str], clock: StoreClock) -> None:
        """Note what the files say now, and that they are done changing.

        Args:
            there: entries that exist; known ones keep their hits.
            gone: ids that do not.
            clock: of the store; learns what the index knows, and the other way round.
        """
        with self._transaction():
            for info in there:
                self._put(info, self._tick())
                self._db.execute("DELETE FROM pending WHERE id = ?", (info.id,))
            for delete in ("DELETE FROM entries WHERE id = ?", "DELETE FROM pending WHERE id = ?"):
                self._db.executemany(delete, [(key,) for key in gone])
            self._keep_time(clock)

    def hit(self, hits: Sequence[tuple[str, int]], clock: StoreClock) -> list[str]:
        """Count loads, given in the order of their last; ids that the index does not know.

        Args:
            hits: (id, loads).
            clock: of the store, as for `finish`.
        """
        unknown = []
        with self._transaction():
            floor = self._meta("floor")
            for key, number in hits:
                values = {"id": key, "n": number, "clock": self._tick(), "floor": floor}
                if self._db.execute(_HIT, values).rowcount == 0:
                    unknown.append(key)
            self._keep_time(clock)
        return unknown

    def use_policy(self) -> None:
        """Make all priorities this policy's, should the store have been used with another."""
        query = "SELECT value FROM meta WHERE name = 'eviction'"
        if self._db.execute(query).fetchone() == (self._eviction,):
            return
        with self._transaction():
            self._db.execute(
                "UPDATE entries SET priority = score(hits + 1, num_bytes, cost_seconds, clock, 0.0)"
            )
            self._set("floor", 0.0)
            self._set("eviction", self._eviction)

    def _build(self, entries: Iterable[EntryInfo]) -> None:
        with self._transaction():
            for statement in _statements(_SCHEMA):
                self._db.execute(statement)
            self._set("eviction", self._eviction)
            latest = 0
            for info in entries:
                # The order of the last uses is lost; that in which they were made takes its place.
                clock = int(info.created * 1000)
                latest = max(latest, clock)
                self._put(info, clock)
            self._set("clock", latest)
            self._db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            self._db.execute(f"PRAGMA user_version = {VERSION}")

    def _check_version(self) -> None:
        if (self._pragma("application_id"), self._pragma("user_version")) != (APPLICATION_ID, VERSION):
            raise Unbuilt("it is no index of this version")

    def _put(self, info: EntryInfo, clock: int) -> None:
        values = {
            "id": info.id,
            "tenant": info.tenant,
            "num_bytes": info.num_bytes,
            "num_tokens": info.num_tokens,
            "created": info.created,
            "hits": info.hits,
            "clock": clock,
            "cost": info.cost_seconds,
            "expires": info.expires,
            "pinned": int(info.pinned),
            "floor": self._meta("floor"),
        }
        self._db.execute(_PUT, values)

    def _tick(self) -> int:
        self._db.execute("UPDATE meta SET value = value + 1 WHERE name = 'clock'")
        return int(self._meta("clock"))

    def _keep_time(self, clock: StoreClock) -> None:
        # Both numbers belong together, so they are joined with those of others before they are written.
        clock.merge(*self.clock_state())
        for name, value in zip(("wall", "ahead"), clock.state(), strict=True):
            self._set(name, value)

    def _meta(self, name: str) -> float:
        row = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        if row is None or not isinstance(row[0], (int, float)):
            raise Unbuilt(f"it lacks {name}")
        return row[0]

    def _set(self, name: str, value: float | str) -> None:
        self._db.execute("UPDATE meta SET value = ? WHERE name = ?", (value, name))

    def _pragma(self, name: str) -> int:
        return int(self._db.execute(f"PRAGMA {name}").fetchone()[0])

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):  # what went wrong before says more
                self._db.execute("ROLLBACK")
            raise


def _info(row: tuple[Any, ...]) -> EntryInfo:
    key_id, tenant, num_bytes, num_tokens, created, hits, cost_seconds, expires, pinned = row
    return EntryInfo(
        key_id, tenant, num_bytes, num_tokens, created, hits, cost_seconds, expires, bool(pinned)
    )


def _statements(script: str) -> Iterator[str]:
    """The statements of a script: `executescript` would end the transaction that they are to be part of."""
    statement = ""
    for line in script.strip().splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
