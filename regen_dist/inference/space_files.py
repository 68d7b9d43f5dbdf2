"""What generating from a run takes beside its weights: the latent space of the caches that it was trained on, kept in
the run folder and in every exported model.

FOLDER/latent_space/null_text.safetensors    the embedding of the empty caption
FOLDER/latent_space/facts.json               encoder, text encoder, statistics, whitening and frame rate; written last
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regen_dist.config.files import write_bytes_atomically, write_text_atomically
from regen_dist.data.dataset.latents import CacheFacts, TextEmbedding, pack_null_text, unpack_null_text
from regen_dist.errors import CheckpointError, DataError
from regen_dist.inference.latent_space import LatentScale
from regen_dist.inference.statistics import LatentStatistics, parse_statistics
from regen_dist.jsontext import json_text

SPACE_FOLDER, _FACTS, _NULL = "latent_space", "facts.json", "null_text.safetensors"
_KEPT = ("fingerprint", "num_frames", "channels", "fps", "encoder", "preprocessing", "text")


@dataclass(frozen=True, eq=False)
class LatentSpace:
    """The space of a text-to-video model: `facts` (JSON; see `CacheFacts`), the latents' statistics, and the empty
    caption's embedding."""

    facts: Mapping[str, Any]
    statistics: LatentStatistics
    null_text: TextEmbedding

    @property
    def scale(self) -> LatentScale:
        """Normalises latents and undoes it."""
        return LatentScale(self.statistics, float(self.facts.get("whitening", 1.0)))

    @property
    def num_frames(self) -> int:
        """Frames of a clip: k + 1."""
        return int(self.facts["num_frames"])

    @property
    def fps(self) -> float:
        """Frames per second of what the model was trained on."""
        return float(self.facts["fps"])

    @classmethod
    def of(
        cls,
        facts: CacheFacts,
        statistics: LatentStatistics,
        null_text: TextEmbedding,
        sizes: Sequence[tuple[int, int]] = (),
        whitening: float = 1.0,
    ) -> LatentSpace:
        """That of a cache; `sizes` are the (height, width) of the videos in it, `whitening` as of `LatentScale`."""
        kept = {name: _plain(getattr(facts, name)) for name in _KEPT}
        return cls({**kept, "sizes": [list(size) for size in sizes], "whitening": whitening}, statistics, null_text)

    def to_json(self) -> dict[str, Any]:
        """Facts and statistics as plain values."""
        return {**self.facts, "statistics": json.loads(self.statistics.to_text())}

    def write(self, folder: Path) -> None:
        """Keep it in a run folder or an exported model; nothing is written when the same is there."""
        place = folder / SPACE_FOLDER
        text = json_text(self.to_json(), indent=1) + "\n"
        if (place / _FACTS).is_file() and (place / _FACTS).read_text(encoding="utf-8") == text:
            return
        place.mkdir(parents=True, exist_ok=True)
        write_bytes_atomically(place / _NULL, pack_null_text(self.null_text.text))
        write_text_atomically(place / _FACTS, text)


def read_space(folder: Path) -> LatentSpace:
    """The latent space of a text-to-video run or of an exported model.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    place = folder / SPACE_FOLDER
    try:
        facts = json.loads((place / _FACTS).read_text(encoding="utf-8"))
        statistics = parse_statistics(facts.pop("statistics"), str(place))
        return LatentSpace(facts, statistics, unpack_null_text((place / _NULL).read_bytes()))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{place} is not there or not whole ({error.filename}): is {folder} a text-to-video run that has begun to "
            "train? Copy it from the run, or run `regen train` again, which writes it"
        ) from None
    except (OSError, ValueError, KeyError, DataError) as error:
        raise CheckpointError(f"{place} is damaged ({type(error).__name__}: {error}); copy it from the run") from error


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value
