"""The miniature, judged: videos of moving shapes are read back without learning and compared with their captions."""
