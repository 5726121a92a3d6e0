"""What is remembered: the ledger, its tables and results, and where everything lies."""
