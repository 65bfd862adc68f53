"""What the MoA U-Net is told: text tokens, image features, and the multimodal tokens made of both."""
