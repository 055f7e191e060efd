"""Lists of prompts, shipped or from files."""
