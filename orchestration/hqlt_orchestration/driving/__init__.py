"""The study loop: what is tried next, where it runs, when it ends."""
