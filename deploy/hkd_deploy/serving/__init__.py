"""Files for inference servers: Triton model repositories and DeepStream configurations."""
