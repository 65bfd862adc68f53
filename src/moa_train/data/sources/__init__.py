"""Where samples come from: the toy world, photographs."""
