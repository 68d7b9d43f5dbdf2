"""One training run: tasks, the loop, guards and stopping."""
