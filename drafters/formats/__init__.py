"""Exported folders: writing, metadata, reloading and static checks."""
