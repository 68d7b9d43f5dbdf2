"""Presets as tests want them: independent of how `nano` is tuned."""

from __future__ import annotations

STAGES_AT_8 = "[{channels: 64, temporal: 2}, {channels: 96, spatial: 2, temporal: 2}, {channels: 128, temporal: 2}]"
NANO_AT_8 = [  # overrides that make configs/embedder/nano*.yaml a k = 8 model with full attention
    "model.temporal_compression=8",
    f"model.encoder.stages={STAGES_AT_8}",
    "model.decoder.attention={backend: sdpa, pattern: full}",
]
