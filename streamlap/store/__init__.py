"""Bytes: shards, hidden states, the journal, the lock, the hub."""
