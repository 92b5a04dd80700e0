"""Pictures, tables and logs that people look at."""
