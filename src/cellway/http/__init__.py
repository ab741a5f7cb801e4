"""The Compute API shell."""
