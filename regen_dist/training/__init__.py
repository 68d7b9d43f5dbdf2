"""What one run does: tasks, the loop, guards and stopping."""
