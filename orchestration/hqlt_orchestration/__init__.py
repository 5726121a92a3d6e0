"""The `hqlt` command: what is tried next, where it runs, which result counts, and what is recorded."""
