"""What makes a run survive and be made again: journal, replay, checkpoints, resume."""
