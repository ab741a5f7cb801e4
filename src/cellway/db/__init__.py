"""The database wire: engines, tables and schema versions of the API database and of the cells' databases."""
