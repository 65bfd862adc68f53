"""What the paper compares MoA with, behind the same protocol (`moa_train.model.unet.Method`)."""
