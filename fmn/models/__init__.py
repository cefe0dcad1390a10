"""Checkpoints: fetched from anywhere, checked, loaded, fine-tuned, and asked for predictions."""
