"""Which layers to leave alone, and which bits for which layer: measured at the final latents, and chosen."""
