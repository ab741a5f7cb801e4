"""Instances: the rows of a cell's database that say what each server is and does.

`records` is the shape of an instance, `reading` finds and lists, `writing` changes what users set, `lifecycle` is what
builders, conductors and agents write under fences, `actions` is the audit of what was asked. All take a `CellTx`.
"""
