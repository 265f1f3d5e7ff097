"""Stores of prebuilt caches: an interface, a naive one in memory, one on disk, and who refers to what."""
