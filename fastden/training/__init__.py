"""Training of the denoiser: configuration, data, noise, Lightning module. ``fastden train`` is its command."""
