"""Models in the form that diffusers opens: a folder with the weights and one module of code, which does not need this
package. `embedder.py` and `pipeline.py` are the interface for users of diffusers; only they import it."""
