"""Text encoders: the models of transformers in a pipeline of diffusers, quantized, saved and loaded as its own are."""
