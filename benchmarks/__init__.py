"""What an operation costs in CPU time, next to the least that it could cost: `make bench`, or `python -m benchmarks`.

It uses the system as a client does, through `cellway.testing` and a real socket. Nothing in `src/` may import it.
"""
