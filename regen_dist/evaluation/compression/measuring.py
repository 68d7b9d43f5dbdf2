"""What a trained arm makes of the test clips: at three sizes, in more steps, and between given frames."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from regen_dist.checkpoint.export import find_checkpoint, open_run
from regen_dist.config import RunConfig, config_hash
from regen_dist.config.files import write_text_atomically
from regen_dist.config.schema import SPATIAL_COMPRESSION
from regen_dist.errors import ConfigError
from regen_dist.evaluation.compression.clips import Stretch, TestSet, cut, read_stretch
from regen_dist.evaluation.compression.quality import Decoded, features_of, mean_psnr_db, quality
from regen_dist.inference.codec import Codec
from regen_dist.inference.frames import Frame
from regen_dist.jsontext import json_text
from regen_dist.pixels import to_frames, to_videos

TRAINED, DOUBLE, OTHER = "training", "double", "other aspect"
_VERSION = 1  # of what is measured: measures of another are made again
_SHOWN = 2  # stretches whose decoded frames are kept for the page


class Size(NamedTuple):
    """A crop (height, width) of frames that were resized to a short side, in pixels."""

    crop: tuple[int, int]
    short_side: int


def sizes_of(config: RunConfig) -> dict[str, Size]:
    """The sizes that are tested: the training crop; the same view at twice the resolution; a crop of about the same
    area at the training scale that is about 2.25 times as wide for its height.

    Raises:
        ConfigError: the config does not say at which scale it trains.
    """
    side, (height, width) = config.data.short_side, config.data.size
    if not isinstance(side, int):
        raise ConfigError(f"data.short_side is {side}; this needs the short side of the whole frame, in pixels")
    low = max(1, round(height / 1.5 / SPATIAL_COMPRESSION)) * SPATIAL_COMPRESSION
    wide = max(1, round(height * width / low / SPATIAL_COMPRESSION)) * SPATIAL_COMPRESSION
    return {
        TRAINED: Size((height, width), side),
        DOUBLE: Size((2 * height, 2 * width), 2 * side),
        OTHER: Size((low, wide), side),
    }


def measure_arm(
    run: Path,
    tests: TestSet,
    sizes: Mapping[str, Size],
    kept: Path,
    steps: Sequence[int],
    *,
    fresh: bool = False,
    threads: int | None = None,
) -> dict[str, Any]:
    """All measures of an arm. They are kept in a file, and taken from it while weights and clips are the same.

    Args:
        run: folder of the arm's run.
        tests: the test clips.
        sizes: at which they are read.
        kept: the file; beside it, with the ending `.npz`, decoded frames of the first and the last stretch.
        steps: sampling steps, 1 among them.
        fresh: measure even so.
        threads: of this process, where it is one of several.

    Raises:
        CheckpointError: there is no good checkpoint.
        DataError: a clip cannot be read.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    key = _key(run, tests, sizes, steps)
    if not fresh and (found := _kept(kept, key)):
        return found
    codec, measures, frames = Codec.load(run), dict[str, Any](), dict[str, Frame]()
    for name, size in sizes.items():
        sources = [read_stretch(tests.folder, each, size.crop, size.short_side) for each in tests.stretches]
        decoded = {number: _decoded(codec, sources, number) for number in steps}
        features = features_of(each.source for each in decoded[1])
        measures[name] = {str(number): quality(found, features) for number, found in decoded.items()}
        frames |= _shown(name, tests.stretches, decoded[1])
        if name == TRAINED:
            measures["between"] = between(codec, sources)
    kept.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(kept.with_suffix(".npz"), **frames)  # type: ignore[arg-type]
    write_text_atomically(kept, json_text({"key": key, "step": codec.step, "measures": measures}, indent=1) + "\n")
    return measures


def _key(run: Path, tests: TestSet, sizes: Mapping[str, Size], steps: Sequence[int]) -> str:
    """What the measures depend on, as one hash: the config, the bytes of the weights, the clips."""
    config, folder = open_run(run)
    manifest = find_checkpoint(folder, checksums=False)
    told = [_VERSION, config_hash(config), manifest.step, sorted(str(each) for each in manifest.files.values())]
    told += [
        [str(tests.folder.resolve()), tests.facts()],
        {name: str(size) for name, size in sizes.items()},
        list(steps),
    ]
    return hashlib.sha256(json_text(told).encode()).hexdigest()


def _kept(path: Path, key: str) -> dict[str, Any] | None:
    if not path.is_file() or not path.with_suffix(".npz").is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found["measures"] if found["key"] == key else None


def _decoded(codec: Codec, sources: Sequence[Frame], steps: int) -> list[Decoded]:
    """Every stretch, cut into clips, through the codec; those too short for a clip are left out."""
    found, number = [], 0
    for source in sources:
        clips = cut(source, codec.num_frames)
        if clips:
            whole = np.concatenate(clips)
            made = _made(codec, to_videos(clips), torch.arange(codec.num_frames), steps, number)
            found.append(Decoded(whole, made))
        number += len(clips)
    return found


def _made(codec: Codec, clips: Tensor, times: Tensor, steps: int, number: int) -> Frame:
    """Decoded frames at `times` of each clip, one clip after the other. `number` is the first clip's, for the noise."""
    ids = range(number, number + len(clips))
    videos = codec.decode(codec.encode(clips), times, steps=steps, sample_ids=ids)
    return np.concatenate([to_frames(each) for each in videos])


def between(codec: Codec, sources: Sequence[Frame]) -> dict[str, Any]:
    """PSNR in dB of the frames that were held out, where every second of 2k + 1 frames is encoded, in one step.

    `decoded` asks for the times between; `decoded_then_blended` decodes the frames that were given and takes the mean
    of the neighbours, all that the baseline can; `blended` is the mean of the source's own neighbours, which a decoder
    does not have. Where no stretch is long enough, `clips` is 0 and nothing else is there.
    """
    k, ways = codec.temporal_compression, dict[str, list[Decoded]]()
    for number, source in enumerate(sources):
        for clip in cut(source, 2 * k + 1):
            for way, made in _between(codec, clip, number).items():
                ways.setdefault(way, []).append(Decoded(clip[1::2], made))
    count = len(ways.get("blended", ()))
    return {"clips": count, **{f"{way}_db": mean_psnr_db(found) for way, found in ways.items()}}


def _between(codec: Codec, clip: Frame, number: int) -> dict[str, Frame]:
    """The odd frames of a clip of 2k + 1, by every way."""
    given, whole = to_videos([clip[::2]]), torch.arange(codec.num_frames)
    ways = {"decoded_then_blended": _blended(_made(codec, given, whole, 1, number)), "blended": _blended(clip[::2])}
    if codec.kind == "regen":
        ways["decoded"] = _made(codec, given, whole[:-1] + 0.5, 1, number)
    return ways


def _blended(frames: Frame) -> Frame:
    """The mean of each frame and the next."""
    mean = (frames[:-1].astype(np.uint16) + frames[1:] + 1) // 2
    return mean.astype(np.uint8)


def _shown(size: str, stretches: Sequence[Stretch], decoded: Sequence[Decoded]) -> dict[str, Frame]:
    """The first and the last stretch, for the page: the source, and what was made of it."""
    if len(decoded) != len(stretches):
        return {}
    places = sorted({0, len(stretches) - 1})[:_SHOWN]
    return {f"{size}/{place}/{part}": getattr(decoded[place], part) for place in places for part in Decoded._fields}
