"""The training side: one class a file, one object for every loop."""
