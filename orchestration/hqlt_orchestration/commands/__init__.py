"""What each `hqlt` command does; `cli.py` parses its arguments and calls one of these."""
