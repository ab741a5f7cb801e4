"""The operator's command line. `main.py` is the tree; each group of commands has a file of its own."""
