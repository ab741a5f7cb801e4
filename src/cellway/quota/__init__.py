"""Quotas (seed 003): what projects and users may have, what they have, and the limits that still stand in the cells.

`limits` says how much is allowed; `usage` grants it and keeps count; `legacy` is the limits in a cell's own tables, and
how a move of them and the API keep out of each other's way; `moving` is that move. All take an `ApiTx`, but for what
reads and buries a cell's rows.
"""
