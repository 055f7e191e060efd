"""The machine that dmquant runs on: files, processes, memory and the terminal."""
