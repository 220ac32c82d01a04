"""A run on disk: its folder, facts, log and checkpoints."""
