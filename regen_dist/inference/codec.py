"""A trained embedder as a codec: clips to latents, latents to frames at any times, frames in tiles; the
windows of a long video.

Legend: B clips, T frames, F frames of a longer video, H x W pixels, h = H/8, w = W/8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regen_dist.checkpoint.export import STATISTICS_FILE, Weights, build_with_weights, find_embedder
from regen_dist.config.embedder import EmbedderConfig
from regen_dist.config.exported import ExportConfig
from regen_dist.config.run import SPATIAL_COMPRESSION as P
from regen_dist.diffusion.noise import gaussian
from regen_dist.diffusion.path import x0_from
from regen_dist.diffusion.samplers import Denoiser, sample
from regen_dist.errors import CheckpointError, ConfigError
from regen_dist.inference.latent_space import LatentStatistics, only_raw, read_statistics
from regen_dist.models.decoder import ReceptiveField, decoder_receptive_field, encoder_receptive_field
from regen_dist.models.diffusers_encoder import ENCODER_FACT, DiffusersEncoder
from regen_dist.models.embedder import Baseline, Regen
from regen_dist.models.encoder import Encoder, Latents, check_clip
from regen_dist.models.layers import require_cudnn
from regen_dist.observe.hardware import choose_device, inference_dtype

# Tiled encoding and decoding of frames. Each tile is read with its full receptive field, so nothing is blended and the
# result equals that of the whole frame up to rounding. Memory is bounded by the size of a tile; the cost is that the
# surroundings of each tile are computed again.
#
# Legend: a cell is the position of one latent, P = 8 pixels a side; h x w cells of a frame.


class TileCut(NamedTuple):
    """A tile along one axis, in cells of the frame: [start, stop) is kept, [first, last) is read."""

    start: int
    stop: int
    first: int
    last: int


class Tile(NamedTuple):
    """A tile of a frame."""

    rows: TileCut
    columns: TileCut

    def read(self, frames: Tensor, scale: int = 1) -> Tensor:
        """Crop the region that the tile reads from [..., h, w] latents, or from pixels (`scale` = 8)."""
        rows, columns = (slice(cut.first * scale, cut.last * scale) for cut in self)
        return frames[..., rows, columns]

    def keep(self, out: Tensor, made: Tensor, scale: int = 1) -> None:
        """Write the result of a tile into the whole frame, without its surroundings."""
        rows, columns = (slice(cut.start * scale, cut.stop * scale) for cut in self)
        top, left = ((cut.start - cut.first) * scale for cut in self)
        height, width = ((cut.stop - cut.start) * scale for cut in self)
        out[..., rows, columns] = made[..., top : top + height, left : left + width]


def axis_cuts(length: int, tile: int, reach: int, step: int) -> Iterator[TileCut]:
    """Cut an axis of `length` cells into tiles: each keeps about `tile` cells, a multiple of `step`."""
    kept, around = max(tile // step, 1) * step, -(-reach // step) * step
    for start in range(0, length, kept):
        stop = min(start + kept, length)
        yield TileCut(start, stop, max(start - around, 0), min(stop + around, length))


def frame_tiles(grid: tuple[int, int], side: int, reach: ReceptiveField) -> Iterator[Tile]:
    """Cut a frame of `grid` = (h, w) cells into tiles of about `side` pixels a side."""
    axes = zip(grid, reach.cells, reach.step, strict=True)
    for rows, columns in product(*(list(axis_cuts(length, side // P, cells, step)) for length, cells, step in axes)):
        yield Tile(rows, columns)


def encode_in_tiles(encode: Callable[[Tensor], Latents], clips: Tensor, side: int, reach: ReceptiveField) -> Latents:
    """Encode clips [B, 3, T, H, W] to latents, one tile of one clip at a time."""
    return Latents(*map(torch.cat, zip(*(_encode(encode, clip, side, reach) for clip in clips.split(1)), strict=True)))


def _encode(encode: Callable[[Tensor], Latents], clip: Tensor, side: int, reach: ReceptiveField) -> Latents:
    height, width = (length // P for length in clip.shape[-2:])
    whole: Latents | None = None
    for tile in frame_tiles((height, width), side, reach):
        made = encode(tile.read(clip, P))
        if whole is None:
            whole = Latents(*(part.new_empty(*part.shape[:2], height, width) for part in made))
        for out, part in zip(whole, made, strict=True):
            tile.keep(out, part)
    assert whole is not None, "a frame has tiles"
    return whole


def decode_in_tiles(
    decode: Callable[[Latents, Tile], Tensor], latents: Latents, frames: int, side: int, reach: ReceptiveField
) -> Tensor:
    """Decode latents [1, C, h, w] to pixels [1, 3, T, H, W] in float32, tile by tile.

    Args:
        decode: map from a tile's latents and the tile to its pixels.
        latents: latents of one clip.
        frames: T.
        side: side of a tile in pixels.
        reach: receptive field of the decoder.
    """
    height, width = latents.content.shape[-2:]
    out = torch.empty(1, 3, frames, height * P, width * P, device=latents.content.device)
    for tile in frame_tiles((height, width), side, reach):
        tile.keep(out, decode(Latents(*map(tile.read, latents)), tile), P)
    return out


_SMALLEST_TILE = 64
Decode = Callable[[Latents, Tile | None], Tensor]  # latents of a tile, or of the whole frame (None), to pixels

# The embedder that the package carries, as `regen checkpoint export` wrote it; its README.md is its model card.
PACKAGED_EMBEDDER = Path(__file__).parents[1] / "pretrained" / "pocket"


class Codec:
    """Embedder for inference. Takes and returns float32 videos in [-1, 1]; computes in the precision of training
    (`inference_dtype`) unless another `dtype` is given.

    Attributes:
        tile: side in pixels of the tiles that frames are processed in; None for whole frames (`use_tiles`).
    """

    def __init__(
        self,
        model: Regen | Baseline,
        config: EmbedderConfig | ExportConfig,
        device: torch.device,
        step: int = 0,
        statistics: LatentStatistics | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.config = config if isinstance(config, ExportConfig) else ExportConfig.of(config)
        self.device, self.step, self.weights, self.statistics = device, step, self.config.weights, statistics
        self._dtype = dtype or inference_dtype(self.config.precision, device)
        require_cudnn(device.type, self._dtype)
        self.model = model.to(device, self._dtype).eval()
        self.kind, self.num_frames = config.model.kind, config.model.num_frames
        self.temporal_compression = config.model.temporal_compression
        self.latent_channels = config.model.latent.channels
        self.cell = config.model.encoder.spatial  # pixels a side of a latent cell
        self.tile: int | None = None

    @classmethod
    def load(cls, path: str | Path, weights: Weights | None = None, device: torch.device | None = None) -> Codec:
        """Load a trained embedder from a run folder or an export. Nothing is unpickled.

        Args:
            path: a run folder, whose newest good checkpoint is taken; or what `regen checkpoint export` wrote.
            weights: the averaged weights (`ema`) or those of the last step (`plain`); None takes the averaged weights
                of a run, and whichever weights an export holds.
            device: CUDA by default, where it is available.

        Raises:
            CheckpointError: there is no checkpoint, or it is damaged; an export holds other weights than requested, or
                is a text-to-video model.
            ConfigError: the folder is neither a run of an embedder nor an export.
        """
        found = find_embedder(path, weights)
        model = build_with_weights(found.config.model, found.weights(), found.what)
        set_expected_encoder(model.encoder, found.data)
        statistics = None if found.run is not None else read_statistics(found.path / STATISTICS_FILE)
        return cls(model, found.config, device or choose_device(), found.step, statistics)

    def use_tiles(self, side: int | None) -> None:
        """Encode and decode frames in tiles from now on, which bounds the memory that large frames take.

        Each tile is read with its full receptive field, so the result equals that of whole frames up to rounding
        (docs/codec.md states the tolerance and the cost).

        Args:
            side: side of a tile in pixels, rounded down to the decoder's windows; None returns to whole frames.

        Raises:
            ConfigError: the decoder attends over whole frames, or the side is below 64.
        """
        if side is not None and side < _SMALLEST_TILE:
            raise ConfigError(f"a tile of {side} pixels; it must have at least {_SMALLEST_TILE} a side")
        if side is not None and self.config.model.encoder.frozen:
            raise ConfigError("frames are not tiled for somebody else's encoder; leave the tiles out")
        if side is not None and decoder_receptive_field(self.config.model) is None:
            raise ConfigError(
                "this decoder attends over whole frames (model.decoder.attention.pattern=full), so a tile cannot give "
                "what the whole frame gives; leave the tiles out, or take a model with pattern=window"
            )
        self.tile = side

    @torch.no_grad()
    def encode(self, clips: Tensor) -> Latents:
        """Encode clips [B, 3, k+1 or 1, H, W], sides multiples of 8, to latents [B, 8, h, w]; raises DataError when the
        shape does not fit."""
        return Latents(*(self._finite(part, "encodes to latents") for part in self._encode(clips)))

    def _encode(self, clips: Tensor) -> Latents:
        if self.tile is None:
            return self.model.encode(clips.to(self.device))
        check_clip(clips, self.num_frames)
        reach = encoder_receptive_field(self.config.model.encoder)
        return encode_in_tiles(lambda part: self.model.encode(part.to(self.device)), clips, self.tile, reach)

    def _finite(self, made: Tensor, what: str) -> Tensor:
        return finite(made, self._dtype, f"the embedder of step {self.step} {what}", "what it was given")

    def decode(
        self,
        latents: Latents,
        times: Tensor,
        *,
        steps: int = 1,
        seed: int = 0,
        sample_ids: Sequence[int] | None = None,
        starts: Sequence[float] | None = None,
    ) -> Tensor:
        """Decode clips independently of each other.

        Args:
            latents: [B, 8, h, w] each.
            times: [T] real numbers, in frames from each clip's first; any subset of frames, times between them, and
                times slightly past the end.
            steps: number of decoder evaluations.
            seed, sample_ids, starts: keys of the noise: the sample (its number in the batch by default) and the
                absolute time, where `starts` (0 by default) is the position of each clip's first frame in its video.

        Returns:
            [B, 3, T, H, W] in [-1, 1].

        Raises:
            DataError: the latents are normalised ones.
            ConfigError: in the same cases as for `decode_windows`.
        """
        count = len(only_raw(latents).content)
        ids, firsts = sample_ids or range(count), starts or [0.0] * count
        frames = []
        for clip in range(count):
            own = Latents(*(latent[clip : clip + 1] for latent in latents))
            window = Window(own, firsts[clip], self.num_frames if bool((own.motion != 0).any()) else 1)
            absolute = times.to(torch.float64) + firsts[clip]
            frames.append(self.decode_windows([window], absolute, steps=steps, seed=seed, sample_id=ids[clip]))
        return torch.cat(frames)

    @torch.no_grad()
    def decode_windows(
        self, windows: list[Window], times: Tensor, *, steps: int = 1, seed: int = 0, sample_id: int = 0
    ) -> Tensor:
        """Decode a stretch of a video from windows that may overlap. There is one noise, keyed by absolute time, and
        one estimate, blended from the windows' estimates at every step (docs/reconstruct.md).

        Args:
            windows: encoded clips of one video.
            times: [F] real numbers, in frames of the video.

        Returns:
            [1, 3, F, H, W] in [-1, 1], float32.

        Raises:
            ConfigError: fewer than one step; or times between frames were requested from the baseline, which decodes
                whole frames only.
        """
        weights = window_weights(windows, times).to(self.device).float()
        denoise = self._blended(windows, times.to(self.device), weights)
        if isinstance(self.model, Baseline):
            if steps != 1:
                raise ConfigError(f"the baseline decodes in one pass; found {steps} steps, use 1")
            made = denoise(torch.empty(1, device=self.device), torch.ones(1))
            return self._finite(made, "decodes to pixels").clamp(-1, 1)
        height, width = (self.cell * side for side in windows[0].latents.content.shape[-2:])
        noise = gaussian(
            seed, torch.tensor([sample_id], device=self.device), times[None].to(self.device), (height, width)
        )
        settings = self.config.diffusion
        made = sample(denoise, noise, path=settings.path, steps=steps, method=settings.sampler)
        return self._finite(made, "decodes to pixels").clamp(-1, 1)

    def _blended(self, windows: list[Window], times: Tensor, weights: Tensor) -> Denoiser:
        """Map from (x_t [1, 3, F, H, W], t [1]) to the windows' estimates of x0, weighted by `weights` [windows, F]."""

        return lambda x, t: blended(
            windows, weights, lambda window, seen: self._window(window, times[seen] - window.start, x, seen, t)
        )

    def _window(self, window: Window, times: Tensor, x: Tensor, seen: Tensor, t: Tensor) -> Tensor:
        """One window's estimate of the frames `seen`, [1, 3, n, H, W]."""
        latents = Latents(*(each.to(self.device, self._dtype) for each in window.latents))  # from a cache, or generated
        model, length = self.model, window.length
        if isinstance(model, Baseline):
            frames = self._in_tiles(lambda part, tile: model.reconstruct(part, length), latents, length)
            return frames[:, :, _whole(times, length)]
        noisy, t, settings = x[:, :, seen], t.to(self.device), self.config.diffusion

        def denoise(part: Latents, tile: Tile | None) -> Tensor:
            return model.denoise(noisy if tile is None else tile.read(noisy, P), t, part, times[None].float())

        return x0_from(settings.path, settings.target, self._in_tiles(denoise, latents, len(seen)), noisy, t)

    def _in_tiles(self, decode: Decode, latents: Latents, frames: int) -> Tensor:
        """Pixels of the whole frames, [1, 3, n, H, W]."""
        if self.tile is None:
            return decode(latents, None)
        reach = decoder_receptive_field(self.config.model)
        assert reach is not None, "use_tiles has refused"
        return decode_in_tiles(decode, latents, frames, self.tile, reach)


def finite(made: Tensor, dtype: torch.dtype, act: str, given: str) -> Tensor:
    """Return the result `made` of a model's `act` in `dtype`; CheckpointError where it is not finite, because of the
    weights or of what was `given`."""
    if bool(torch.isfinite(made).all()):
        return made
    if dtype is torch.float16:
        raise CheckpointError(
            f"in float16 {act} that are not finite: activations exceed 65504, the largest number of float16. Load it "
            "with torch_dtype=torch.bfloat16, or torch.float32"
        )
    raise CheckpointError(
        f"{act} that are not finite: its weights, or {given}, are broken. Take an earlier checkpoint, or train on from "
        "one with a lower optimizer.lr"
    )


def set_expected_encoder(encoder: Encoder | DiffusersEncoder, facts: Mapping[str, Any] | None) -> None:
    """Let a frozen encoder check that it is the one of the training, where the checkpoint's `facts` name one."""
    if isinstance(encoder, DiffusersEncoder):
        encoder.expected = (facts or {}).get(ENCODER_FACT)


def _whole(times: Tensor, length: int) -> Tensor:
    """Frame numbers of whole times."""
    numbers = times.round().long()
    if bool(((times - numbers).abs() > 1e-4).any()) or bool((numbers < 0).any()) or bool((numbers >= length).any()):
        raise ConfigError(
            f"the baseline decodes the frames 0 to {length - 1} of a clip alone, not times between or beyond them"
            "; give whole times in this range, or use a REGEN model"
        )
    return numbers


# Windows of a long video: cutting it into overlapping clips, and the weight of each clip at a given time.
#
# Frames are numbered from 0 and stand for bins of width one; a window of `n` frames that starts at frame `s` covers
# the times `[s, s + n - 1]`. Two windows that share `m` frames are cross-faded by a linear ramp over these `m` bins:
# with one shared frame each window counts one half there, with two the weights go 1/4, 3/4. With a `fade` the ramp is
# wider than what they share: both windows are decoded past their ends (docs/reconstruct.md). The blending is our own
# choice, not the paper's.
Shot = tuple[float, float]  # times [first, stop) of a video without a cut
WHOLE: Shot = (-math.inf, math.inf)


@dataclass(frozen=True, eq=False)
class Window:
    """One encoded clip of a longer video.

    Attributes:
        latents: the clip's latents (B = 1).
        start: frame of the video where it starts.
        length: its frames.
        fade: frames that a cross-fade with a neighbour may reach past the middle (`blend_weights`).
        shot: times that it may be used for; windows of two shots are never blended.

    Raises:
        DataError: the latents are normalised ones.
    """

    latents: Latents
    start: float
    length: int
    fade: int = 0
    shot: Shot = WHOLE

    def __post_init__(self) -> None:
        only_raw(self.latents)


def plan_windows(num_frames_video: int, num_frames_clip: int, overlap: int = 1) -> list[int]:
    """First frame of each window, ascending, so that every frame of the video is in at least one window.

    Neighbours share `overlap` frames, except that the last window is moved back until it is full, and then shares
    more. A video that is not longer than a clip has one window (which the caller pads by repeating the last frame).

    Raises ConfigError when a count is not positive or `overlap` is not in `[0, num_frames_clip - 1]`.
    """
    if num_frames_video < 1 or num_frames_clip < 1:
        raise ConfigError(
            f"a video of {num_frames_video} frames cannot be cut into clips of {num_frames_clip} frames; "
            "both must be at least 1"
        )
    if not 0 <= overlap <= num_frames_clip - 1:
        raise ConfigError(
            f"overlap is {overlap}; clips of {num_frames_clip} frames can share 0 to {num_frames_clip - 1} of them"
        )
    if num_frames_video <= num_frames_clip:
        return [0]
    last = num_frames_video - num_frames_clip
    return [*range(0, last, num_frames_clip - overlap), last]


def window_weights(windows: Sequence[Window], times: Tensor) -> Tensor:
    """Weights of windows of one length at `times` [F], [num_windows, F], by `blend_weights` within each shot."""
    starts, shots = [window.start for window in windows], [window.shot for window in windows]
    return shot_weights(starts, shots, windows[0].length, times, fade=windows[0].fade)


def blended(windows: Sequence[Window], weights: Tensor, decode: Callable[[Window, Tensor], Tensor]) -> Tensor:
    """Sum of the windows' frames, [1, 3, F, H, W], by their `weights` [num_windows, F].

    Args:
        decode: map from a window and the numbers of the frames in which it has a share to these frames.
    """
    total: Tensor | None = None
    for window, weight in zip(windows, weights, strict=True):
        seen = weight.nonzero().squeeze(1)
        if len(seen):
            part = decode(window, seen)
            total = part.new_zeros(1, 3, len(weight), *part.shape[-2:]) if total is None else total
            total[:, :, seen] += weight[seen, None, None] * part
    assert total is not None, "every time belongs to some window"
    return total


def shot_weights(
    starts: Sequence[float], shots: Sequence[Shot], num_frames: int, times: Tensor, *, fade: int = 0
) -> Tensor:
    """Weights of windows in several shots: those of `blend_weights` inside a shot, 0 outside of it.

    Args:
        shots: the shot of each window. Times in no window's shot get no weight at all.
    """
    weights: Tensor | None = None
    for shot in dict.fromkeys(shots):
        rows = [number for number, own in enumerate(shots) if own == shot]
        inside = (times >= shot[0]) & (times < shot[1])
        own = blend_weights([starts[number] for number in rows], num_frames, times[inside], fade=fade)
        if weights is None:
            weights = own.new_zeros(len(starts), len(times))
        weights[torch.tensor(rows, device=times.device)[:, None], inside.nonzero()[:, 0]] = own
    assert weights is not None, "there are windows"
    return weights


def blend_weights(starts: Sequence[float], num_frames: int, times: Tensor, *, fade: int = 0) -> Tensor:
    """Weight of every window at every time: `[num_windows, F]`, columns sum to 1, zero where a window does not reach.

    Args:
        starts: first frame of each window, ascending.
        num_frames: frames of each window.
        times: `[F]` real, in frames of the video. A time that no window covers (before the first, past the last, or
            in the gap between windows that share no frame) belongs to the nearest window, which extrapolates.
        fade: the ramp between two windows covers `2 fade + 1` frames at least. Where they share fewer, both
            extrapolate; 0 keeps to what they share.
    """
    dtype = times.dtype if times.dtype.is_floating_point else torch.float32
    at = times.to(dtype)[None, :]  # 1 F
    first = torch.as_tensor(list(starts), dtype=dtype, device=times.device)[:, None]  # W 1
    last = first + (num_frames - 1)
    shared = last[:-1] - first[1:] + 1  # W-1 1: frames that a window shares with the next one
    past = ((2 * fade + 1 - shared) / 2).clamp(min=0.0) if fade else torch.zeros_like(shared)  # decoded past an end
    none = past.new_zeros(1, 1)
    inside = (at >= first - torch.cat([none, past])) & (at <= last + torch.cat([past, none]))  # W F
    weights = torch.where(inside, _ramps(first, last, at, past), 0.0)
    distance = torch.maximum(first - at, at - last)  # W F, how far outside
    nearest = torch.nn.functional.one_hot(distance.argmin(dim=0), len(starts)).T.to(dtype)
    weights = torch.where(weights.sum(dim=0) > 0, weights, nearest)
    return weights / weights.sum(dim=0, keepdim=True)


def _ramps(first: Tensor, last: Tensor, at: Tensor, past: Tensor) -> Tensor:
    """Ramps `[W, F]`: rise over the frames shared with the previous window and `past` on both sides, then fall."""
    rise, fall = torch.ones_like(first + at), torch.ones_like(first + at)
    shared = last[:-1] - first[1:] + 1 + 2 * past  # W-1 1
    bins = shared.clamp(min=1.0)
    rise[1:] = ((at - first[1:] + past + 0.5) / bins).clamp(0.0, 1.0)
    fall[:-1] = ((last[:-1] - at + past + 0.5) / bins).clamp(0.0, 1.0)
    overlaps = shared > 0
    rise[1:] = torch.where(overlaps, rise[1:], 1.0)
    fall[:-1] = torch.where(overlaps, fall[:-1], 1.0)
    return torch.minimum(rise, fall)
