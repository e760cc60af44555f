"""Run folders: records, checkpoints, metrics and progress."""
