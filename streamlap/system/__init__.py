"""The machine: memory, control groups, meters, progress, signals, rates."""
