"""Captions of moving shapes, all 184,320 of them."""

from __future__ import annotations

from regen_dist.data.synthetic.shapes import WORDINGS, caption, parse_caption
from tests.unit.data.synthetic.test_shapes import EVERYTHING


def test_every_caption_in_every_wording_reads_back() -> None:
    for attributes in EVERYTHING:
        for wording in range(WORDINGS):
            assert parse_caption(caption(attributes, wording)) == attributes
