"""What checkpoints cost: training that saves, saving and loading alone, and what else a user could take.
`regen bench checkpoint` runs them."""
