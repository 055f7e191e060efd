"""Model families, the registry of names, and the stages of a run."""
