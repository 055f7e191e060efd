"""A sweep of the design space of arXiv 2311.12359: formats of 3 to 8 bits by techniques, quality against cost."""
