from kvrag.store.base import KVStore
from kvrag.store.memory import MemoryStore
from kvrag.testing.stores import KVStoreContract


class TestMemoryStore(KVStoreContract):
    def make_store(self) -> KVStore:
        return MemoryStore()
