"""The launcher: from a bare Python to a running PreScope. Standard library only, Python 3.10 up."""
