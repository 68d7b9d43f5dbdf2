"""What text-to-video training gains from a latent cache, and what reading one costs. `regen bench t2v` runs it."""
