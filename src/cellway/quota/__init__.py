"""Quotas (seed 003): limits, what projects and users take of them, and the limits that still stand in the cells.

`usage` is what servers are charged for; `legacy` is the limits in a cell's own tables and how a move of them and the
API keep out of each other's way. All take an `ApiTx`, but for what reads and buries a cell's rows.
"""
