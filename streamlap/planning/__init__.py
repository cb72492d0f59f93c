"""Before a weight is read: what every layer becomes, what that takes, and the schedule that fits."""
