"""Rows and prompts from files, folders, the hub or the standard library."""
