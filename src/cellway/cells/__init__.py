"""Routing: which cells there are, which one holds an instance, and contexts that are targeted at one."""
