"""`regen bench compression`: REGEN beside its baseline and its variants, trained at one budget, on unseen video."""
