"""The device of a run: copies to it and back, its memory, and host memory that it copies from and to."""
