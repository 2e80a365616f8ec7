"""Training: the loop, the loss, optimisers, schedules, checkpoints, gates and metrics."""
