"""What an operator does to cells, hosts and databases: the command line calls these, and later an operator API."""
