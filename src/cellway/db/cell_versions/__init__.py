"""The schema versions of a cell's database: one file each, named as the version it brings."""
