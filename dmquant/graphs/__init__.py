"""What graphs of torch hold of a quantized layer: those of autograd, and those that torch.compile traces."""
