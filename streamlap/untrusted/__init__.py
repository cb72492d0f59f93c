"""Readers of what strangers wrote: JSON, YAML, .npy, and where the files of a checkpoint may lie."""
