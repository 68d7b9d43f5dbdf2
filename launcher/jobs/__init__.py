"""`regen jobs`: what runs, what it has said, how to stop it and how to go on."""
