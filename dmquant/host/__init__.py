"""Files, processes, memory and the terminal: what dmquant asks of the machine it runs on."""
