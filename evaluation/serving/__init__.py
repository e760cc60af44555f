"""A drafter in the engine that serves it: speed under load with and without it, and what it accepts."""
