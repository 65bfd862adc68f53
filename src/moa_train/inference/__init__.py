"""Pictures from personalized weights: a diffusers pipeline that takes subjects."""
