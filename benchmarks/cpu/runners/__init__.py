"""One process per engine and model: it loads, runs what its plan says and prints JSON lines."""
