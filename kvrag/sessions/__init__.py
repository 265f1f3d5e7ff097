"""Conversations with a bounded memory: turns, histories, snapshots, files, many of them."""
