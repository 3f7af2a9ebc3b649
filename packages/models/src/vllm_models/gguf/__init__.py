"""GGUF files: their header, their tensors under Hugging Face names, and their block types."""
