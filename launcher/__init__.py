"""How a run reaches machines. Imports no torch, so that it also starts on a login node."""
