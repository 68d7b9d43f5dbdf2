"""What encoding and decoding a clip costs, beside the codecs that a user would take instead: `regen bench codec`."""
