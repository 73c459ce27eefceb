"""Stable Diffusion 3: its transformer, prompts, pipelines, and the miniature's digits."""
