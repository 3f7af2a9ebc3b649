"""What the demonstration model can talk about, one module per topic."""
