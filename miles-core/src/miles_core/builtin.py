"""What core itself offers, declared like any plugin."""
