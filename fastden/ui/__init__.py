"""The page of ``fastden ui``: pictures are dropped on it, and come back denoised."""
