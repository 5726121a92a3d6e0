"""The MLflow mirror: what happened is appended to a spool, and a process of its own ships it."""
