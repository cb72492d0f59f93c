"""LoRAP (Li, Tang & Zhang 2024, arXiv 2404.09695), as published."""
