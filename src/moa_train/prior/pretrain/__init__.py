"""Training of the bundled toy prior, stage by stage: auto-encoder, text-to-image U-Net, image encoder, probe."""
