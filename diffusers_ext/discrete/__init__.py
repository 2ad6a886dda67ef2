"""What is about tokens and no sampler: losses of discrete diffusion models, and music as tokens."""
