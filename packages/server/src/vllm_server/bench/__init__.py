"""Load generation: against any OpenAI-compatible server, or straight through the engine."""
