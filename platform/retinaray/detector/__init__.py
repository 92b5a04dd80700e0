"""The detector: torch only, no files, no configuration, no Ray."""
