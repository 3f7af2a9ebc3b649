"""Figures of the engine core, standard library only."""
