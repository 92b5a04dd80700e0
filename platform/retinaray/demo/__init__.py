"""The embedded demonstration: a scene set, an S3 server and a walk through every command."""
