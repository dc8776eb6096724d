"""Many files: planned, read, denoised, written whole, and recorded."""
