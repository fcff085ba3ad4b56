"""The run: loop, step, schedules, validation, saving and resuming."""
