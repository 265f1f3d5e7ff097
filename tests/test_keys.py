"""Keys in files and variables."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest

from kvrag.config import store_key, tenant_key
from kvrag.errors import ConfigError
from kvrag.keys import read_key, write_key

KEY = bytes(range(32))


def test_a_new_key_is_random_private_and_read_again(tmp_path: Path) -> None:
    keys = [write_key(tmp_path / name) for name in "ab"]
    assert keys[0] != keys[1]
    assert all(len(key) == 32 for key in keys)
    assert [read_key(tmp_path / name) for name in "ab"] == keys
    assert read_key(keys[0].hex().upper()) == keys[0]
    if sys.platform != "win32":
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    key = write_key(tmp_path / "key")
    with pytest.raises(ConfigError, match="never overwritten"):
        write_key(tmp_path / "key")
    assert read_key(tmp_path / "key") == key
    with pytest.raises(ConfigError, match="cannot be written"):
        write_key(tmp_path / "no" / "key")


@pytest.mark.parametrize(
    "value", ["", "abc", KEY.hex()[:-1], KEY.hex() + "0", "no/such/file", "nul\0", "x" * 9999]
)
def test_what_is_no_key_is_refused_and_not_shown(value: str) -> None:
    with pytest.raises(ConfigError, match="64 hexadecimal digits") as caught:
        read_key(value)
    assert len(value) < 10 or value not in str(caught.value)


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    for content in (b"", b"secret words", bytes(range(256)), KEY):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(ConfigError, match="64 hexadecimal digits") as caught:
            read_key(tmp_path / "file")
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(("name", "read"), [("KVRAG_STORE_KEY", store_key), ("KVRAG_TENANT_KEY", tenant_key)])
def test_keys_of_the_environment(name: str, read: object, tmp_path: Path) -> None:
    assert callable(read)
    (tmp_path / "key").write_text(KEY.hex() + "\n")
    assert read({}) is None
    assert read({name: ""}) is None
    assert read({name: KEY.hex()}) == KEY
    assert read({name: str(tmp_path / "key")}) == KEY
    with pytest.raises(ConfigError, match=f"{name}: a key is 64"):
        read({name: "12345"})
