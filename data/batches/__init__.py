"""Packed batches from traces, in a resumable order."""
