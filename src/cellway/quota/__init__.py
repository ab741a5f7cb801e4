"""Quotas (seed 003): what projects and users may have, and what they have.

`limits` says how much is allowed, `usage` grants it and keeps count, `legacy` is the limits' old tables in the cells and
their way out of them. `limits` and `usage` take an `ApiTx`.
"""
