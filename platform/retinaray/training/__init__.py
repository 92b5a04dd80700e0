"""One training process: schedule, step, state, loop. No Ray."""
