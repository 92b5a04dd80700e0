"""The hand-over to a device: model, build script, DeepStream settings, parser and self-test."""
