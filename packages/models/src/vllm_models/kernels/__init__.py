"""Operators behind plain functions, each file with a textbook `reference` beside the fast form."""
