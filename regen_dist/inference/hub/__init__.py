"""Models in the form that diffusers opens: a folder with one module of code beside the weights, which needs no package
of ours. `embedder.py` and `pipeline.py` are what users of diffusers see; they alone import it."""
