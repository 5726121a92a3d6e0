"""A trial in, its result out: models, tasks, the training loop, checkpoints, evaluation."""
