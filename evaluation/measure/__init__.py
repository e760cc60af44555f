"""Measurements of drafters: acceptance, acceptance length, speed, statistics."""
