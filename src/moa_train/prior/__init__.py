"""The frozen half of the system: Stable Diffusion priors, loaded from anywhere, and the toy prior's own training."""
