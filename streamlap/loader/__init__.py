"""All that is copied into an output folder or registered with transformers."""
