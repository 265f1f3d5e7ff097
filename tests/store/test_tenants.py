"""Tenants of one store: none can find, name, or notice what another keeps."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrag.errors import CacheMiss, ConfigError
from kvrag.store.base import KVStore
from kvrag.store.disk import DiskStore
from kvrag.store.key import EntryKey, Fingerprint
from kvrag.store.memory import MemoryStore
from kvrag.store.tenants import Tenant
from kvrag.testing.stores import assert_same_rows, example_fingerprint, example_rows

ACME = Tenant("acme", b"a secret of acme, 32 bytes long.")
BOLT = Tenant("bolt", b"a secret of bolt, 32 bytes long.")


def fingerprint_of(tenant: Tenant) -> Fingerprint:
    return example_fingerprint(tenant=tenant.label, tenant_key=tenant.key)


def key_of(tenant: Tenant, *tokens: int) -> EntryKey:
    return EntryKey(fingerprint_of(tenant), tokens)


# --- names --------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 99), min_size=1), st.binary(min_size=16, max_size=99), st.text(min_size=1))
def test_names_of_one_text_have_nothing_in_common(tokens: list[int], secret: bytes, name: str) -> None:
    """Another tenant, the same name with another secret, the same secret with another name, no tenant."""
    tenants = [Tenant(name, secret), Tenant(name, secret + b"x"), Tenant(name + "x", secret)]
    keys = [key_of(tenant, *tokens).id for tenant in tenants]
    keys.append(EntryKey(example_fingerprint(), tuple(tokens)).id)
    assert len(set(keys)) == len({tenant.label for tenant in tenants}) + 1 == 4
    assert key_of(Tenant(name, secret), *tokens).id == keys[0]


def test_names_change_in_half_of_their_bits() -> None:
    """No part of a name is a part of the text alone."""
    rng = random.Random(0)
    texts = [tuple(rng.choices(range(1000), k=8)) for _ in range(200)]
    pairs = [(int(key_of(ACME, *t).id, 16), int(key_of(BOLT, *t).id, 16)) for t in texts]
    changed = sum((a ^ b).bit_count() for a, b in pairs) / (256 * len(pairs))
    assert 0.48 < changed < 0.52  # of 51200 fair bits: eight standard deviations


def test_whoever_lacks_the_secret_cannot_make_a_name(tmp_path: Path) -> None:
    """The label is in every manifest; it is not enough."""
    store = DiskStore(tmp_path)
    store.put(key_of(ACME, 1, 2), example_rows((1, 2)))
    label_only = EntryKey(example_fingerprint(tenant=ACME.label), (1, 2))
    with pytest.raises(ConfigError, match="named with its secret"):
        store.get(label_only)
    guessed = Tenant("acme", b"0123456789abcdef")
    with pytest.raises(CacheMiss):
        store.get(EntryKey(example_fingerprint(tenant=ACME.label, tenant_key=guessed.key), (1, 2)))


def test_fingerprints_say_no_secret() -> None:
    fingerprint = fingerprint_of(ACME)
    assert "tenant_key" not in fingerprint.fields()
    shown = f"{fingerprint!r} {fingerprint.fields()} {ACME!r} {key_of(ACME, 1)!r}"
    for secret in (ACME.secret, ACME.key):
        assert secret.hex() not in shown
        assert repr(secret)[2:-1] not in shown


@pytest.mark.parametrize(("name", "secret"), [("", b"x" * 32), ("acme", b""), ("acme", b"x" * 15)])
def test_tenants_that_protect_nothing_are_refused(name: str, secret: bytes) -> None:
    with pytest.raises(ConfigError, match=r"needs a name|random ones"):
        Tenant(name, secret)


# --- content ------------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "disk", "sealed"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> KVStore:
    if request.param == "memory":
        return MemoryStore()
    return DiskStore(tmp_path / "store", key=bytes(32) if request.param == "sealed" else None)


def test_one_tenants_hit_is_the_others_miss(store: KVStore) -> None:
    tokens = (1, 2, 3)
    store.put(key_of(ACME, *tokens), example_rows(tokens))
    for by_layer in (False, True):
        assert_same_rows(store.get(key_of(ACME, *tokens), by_layer=by_layer), example_rows(tokens))
        with pytest.raises(CacheMiss):
            store.get(key_of(BOLT, *tokens), by_layer=by_layer)
    assert key_of(BOLT, *tokens) not in store
    assert not store.delete(key_of(BOLT, *tokens).id)
    assert key_of(ACME, *tokens) in store
    store.put(key_of(BOLT, *tokens), example_rows(tokens))
    assert store.stats().entries == 2
    assert store.delete(key_of(ACME, *tokens).id)
    assert_same_rows(store.get(key_of(BOLT, *tokens)), example_rows(tokens))
    assert store.check().ok
    assert store.stats().damaged == 0


def test_no_name_of_a_tenant_is_on_the_disk(tmp_path: Path) -> None:
    tenant = Tenant("Müller & Söhne", b"0123456789abcdef")
    DiskStore(tmp_path).put(key_of(tenant, 1, 2), example_rows((1, 2)))
    for file in tmp_path.rglob("*"):
        assert "ller" not in str(file)
        assert not file.is_file() or b"ller" not in file.read_bytes()


def test_verifying_needs_no_secret(tmp_path: Path) -> None:
    """Damage and exchanged names are found; nobody else's entries are taken for damaged."""
    store = DiskStore(tmp_path)
    for tenant in (ACME, BOLT):
        store.put(key_of(tenant, 1, 2), example_rows((1, 2)))
    assert store.check(fix=True).ok
    mine, other = (tmp_path / key_of(t, 1, 2).id[:2] / f"{key_of(t, 1, 2).id}.json" for t in (ACME, BOLT))
    other.write_bytes(mine.read_bytes())
    assert store.check().damaged == (key_of(BOLT, 1, 2).id,)


# --- what can be seen from outside --------------------------------------------------------------


def test_a_miss_touches_no_file_of_another(tmp_path: Path) -> None:
    """Every path that a look-up gives to the operating system, in a process of its own."""
    store = DiskStore(tmp_path / "store")
    store.put(key_of(ACME, 1, 2, 3), example_rows((1, 2, 3)))
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from kvrag.errors import CacheMiss\n"
        "from kvrag.store.disk import DiskStore\n"
        "from kvrag.store.key import EntryKey\n"
        "from kvrag.store.tenants import Tenant\n"
        "from kvrag.testing.stores import example_fingerprint\n"
        "import os\n"
        "touched = []\n"
        "for name in ('stat', 'lstat', 'open', 'listdir', 'scandir', 'access'):\n"
        "    def watched(path, *args, real=getattr(os, name), **more):\n"
        "        touched.append(str(path))\n"
        "        return real(path, *args, **more)\n"
        "    setattr(os, name, watched)\n"
        "sys.addaudithook(lambda event, args: touched.append(str(args)) if event == 'open' else None)\n"
        "store = DiskStore(sys.argv[1])\n"
        "tenant = Tenant(sys.argv[2], bytes.fromhex(sys.argv[3]))\n"
        "key = EntryKey(example_fingerprint(tenant=tenant.label, tenant_key=tenant.key), (1, 2, 3))\n"
        "touched.clear()\n"
        "try:\n"
        "    store.get(key)\n"
        "    print('hit')\n"
        "except CacheMiss:\n"
        "    print('miss')\n"
        "print('\\n'.join(touched))\n"
    )

    def seen_by(tenant: Tenant) -> tuple[str, str]:
        arguments = [str(store.path), tenant.name, tenant.secret.hex()]
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
        )
        found, _, paths = done.stdout.partition("\n")
        return found, paths

    name = key_of(ACME, 1, 2, 3).id
    found, paths = seen_by(ACME)
    assert found == "hit"
    assert name in paths  # the watch sees something
    found, paths = seen_by(BOLT)
    assert found == "miss"
    assert name not in paths
    assert key_of(BOLT, 1, 2, 3).id in paths


PAIRS = 600
SHUFFLES = 2000


def seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    with suppress(CacheMiss):
        call()
    return (time.perf_counter_ns() - start) / 1e9


def chance_of(differences: list[float], seed: int) -> float:
    """How often a difference of this size or more comes about if each pair's order means nothing.

    The share of pairs in which the first took longer, against shares with the signs drawn anew: a sign test,
    which no single pause of a busy machine can sway.
    """
    rng = random.Random(seed)
    found = abs(sum(d > 0 for d in differences) - sum(d < 0 for d in differences))
    drawn = (
        abs(2 * rng.getrandbits(len(differences)).bit_count() - len(differences)) for _ in range(SHUFFLES)
    )
    return (1 + sum(other >= found for other in drawn)) / (1 + SHUFFLES)


def pairs(first: Iterator[EntryKey], second: Iterator[EntryKey], store: DiskStore) -> list[float]:
    """Seconds of one look-up less those of another right beside it, in an order drawn for every pair."""
    rng, differences = random.Random(1), []
    for _ in range(PAIRS):
        keys = [next(first), next(second)]
        order = rng.random() < 0.5
        times = [0.0, 0.0]
        for which in (1, 0) if order else (0, 1):
            times[which] = seconds_of(lambda key=keys[which]: store.get(key))
        differences.append(times[0] - times[1])
    return differences


def test_the_time_of_a_miss_says_nothing_of_others(tmp_path: Path) -> None:
    """Texts that another tenant has stored against texts that nobody has; and the same with one's own texts.

    The first must look like chance, in one of three trials at least; the second must not, in any.
    """
    store, fresh = DiskStore(tmp_path, keep_bytes=0), count(10_000)
    for prefix in range(256):  # as in a store of thousands: no miss is one of a folder that is not there
        (tmp_path / f"{prefix:02x}").mkdir()
    for number in range(40):
        for key in (key_of(ACME, number, 7), key_of(BOLT, number, 8)):
            store.put(key, example_rows(key.tokens))

    def stored_by_acme() -> Iterator[EntryKey]:
        return (key_of(BOLT, number % 40, 7) for number in count())

    def stored_by_bolt() -> Iterator[EntryKey]:
        return (key_of(BOLT, number % 40, 8) for number in count())

    def stored_by_nobody() -> Iterator[EntryKey]:
        # As many different ones as of the others: what was asked before may be answered sooner by the system.
        numbers = [next(fresh) for _ in range(40)]
        return (key_of(BOLT, numbers[number % 40], 7) for number in count())

    chances = []
    for trial in range(3):
        chances.append(chance_of(pairs(stored_by_acme(), stored_by_nobody(), store), trial))
        assert chance_of(pairs(stored_by_bolt(), stored_by_nobody(), store), trial) < 0.001
        if chances[-1] > 0.01:
            break
    assert max(chances) > 0.01, f"the time tells what another tenant has stored: {chances}"
