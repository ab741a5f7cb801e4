"""The wires to message queues (seed 001). They know nothing of compute and nothing of databases."""
