"""Objects by URL: buckets and local folders behind one interface."""
