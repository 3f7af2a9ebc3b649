"""Which block holds what: references, content keys, sessions and transfers. No tensors."""
