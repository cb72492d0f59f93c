"""Finished checkpoints as folders: the compressed one, and other containers made from it."""
