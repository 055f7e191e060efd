"""The march through a backbone: block by block, what is decided together, learned, and kept on disk."""
