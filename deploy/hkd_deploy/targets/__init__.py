"""Folders that other people's servers load: Triton's model repository, DeepStream's nvinfer configuration. No torch."""
