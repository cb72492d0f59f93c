"""Text and token ids -> windows of tokens."""
