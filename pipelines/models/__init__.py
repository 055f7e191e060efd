"""Which models there are, where their files are, and whether those are whole."""
