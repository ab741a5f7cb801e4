"""The schema versions of the API database: one file each, named as the version it brings."""
