import uuid
from pathlib import Path

import pytest

from kvrag.store.base import KVStore
from kvrag.store.objects import ObjectStore
from kvrag.testing.stores import KVStoreContract


class TestObjectsInMemory(KVStoreContract):
    def make_store(self) -> KVStore:
        return ObjectStore(f"memory://{uuid.uuid4().hex}")


class TestObjectsInASharedFolder(KVStoreContract):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "shared"

    def make_store(self) -> KVStore:
        return ObjectStore(self.folder.as_uri())


class TestObjectsInAFolderOfAnotherFileSystem(TestObjectsInASharedFolder):
    def make_store(self) -> KVStore:
        self.folder.mkdir()
        return ObjectStore("dir://", path=str(self.folder), target_protocol="file")
