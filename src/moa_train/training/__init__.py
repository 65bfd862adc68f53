"""Training: glue between data, model and Lightning."""
