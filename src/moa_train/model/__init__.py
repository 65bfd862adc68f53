"""The MoA layer, its router, and how they enter a diffusers U-Net."""
