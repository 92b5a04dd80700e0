"""Checkpoints of other projects as weights files."""
