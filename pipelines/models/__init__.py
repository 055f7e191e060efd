"""The models, the places of their files, and checks that those are whole."""
