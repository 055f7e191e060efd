"""All layers of a backbone learned at once, end to end, from its own predictions in full precision."""
