"""The verbs: what is done to servers across the API database, cells and queues."""
