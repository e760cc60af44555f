"""The trace: its schema, its shards, and its metadata."""
