"""Diffusion: counter-based noise, paths and targets, timestep densities, samplers."""
