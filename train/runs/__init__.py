"""One training run: its folder, its record, its checkpoints, and the callbacks that keep them."""
