"""Commands: one thin file each; the only users of Hydra and OmegaConf."""
