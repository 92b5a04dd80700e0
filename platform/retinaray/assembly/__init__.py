"""The one place where settings meet core objects; classes below it never see a configuration."""
