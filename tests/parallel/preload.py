"""Imported once by the server that test processes are forked from."""
