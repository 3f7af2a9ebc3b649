"""What the engine counts: plain numbers, rendered by others."""
