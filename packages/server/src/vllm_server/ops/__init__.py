"""What every request passes on its way, and what operators ask for."""
