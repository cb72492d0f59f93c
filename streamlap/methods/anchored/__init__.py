"""Sub-layers rebuilt in closed form beside the dense model."""
