"""What the training script calls beside the loop itself: clock, stopping, checkpoints, logs and the final report."""
