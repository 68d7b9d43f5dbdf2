"""Object storage: buckets, local folders and web addresses behind one interface."""
