"""The network, its weights and its inference form."""
