"""The text-to-video transformer: velocity of a rectified flow on the latent frames of a row of clips (paper, Sec. 4;
DiT, Peebles & Xie, 2023; adaLN-single and caption projection after PixArt-alpha, Chen et al., 2024; norm of queries and
keys after SD3, Esser et al., 2024; rotary positions after RoFormer, Su et al., 2021).

Legend: B batch, C latent channels, F latent frames (2 per clip: content, motion; 1 for an image), h x w latent cells,
P = 2 cells a side of a token, L = F*(h/P)*(w/P) tokens, M text tokens, Dt their width, D width, N heads, E = D/N.
"""

from __future__ import annotations

from math import gcd, pi, prod

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from regen_dist.config.run import SPATIAL_COMPRESSION, Recomputation
from regen_dist.config.t2v import LATENT_PATCH as P
from regen_dist.config.t2v import T2VModelConfig
from regen_dist.errors import DataError
from regen_dist.models.attention import (
    Grid,
    RotaryAngles,
    attention,
    cross_attention,
    rotary_angles,
    rotate,
)
from regen_dist.models.attention_kernels import TextTokens, text_tokens
from regen_dist.models.layers import (
    Checkpointed,
    Modulation,
    TimestepEmbedding,
    ZeroLinear,
    modulate,
    recompute_activations,
)
from regen_dist.models.sequence_parallel import WHOLE, RowSharing, SequenceShard

FRAMES_PER_CLIP = 2  # content and motion
_NORM_EPS = 1e-6
# Text tokens, by device: cuDNN plans anew, hundreds of milliseconds, for each new length; and at lengths of 64 modulo
# 128 its backward pass with a mask can give NaN on Hopper (pytorch#196678).
_TEXT_MULTIPLE = {"cuda": 128}
_PLACE_OCTAVES = 4  # of the sinusoids of a token's position in its frame


def token_grid(latents: tuple[int, int, int]) -> Grid:
    """Frames, rows and columns of the tokens of (F, h, w) latents.

    Raises:
        DataError: h or w is odd.
    """
    frames, height, width = latents
    if not frames or not height or not width or height % P or width % P:
        raise DataError(
            f"latents of {height}x{width} cells and {frames} frames cannot be cut into tokens of {P}x{P}; sides of the "
            f"video must be multiples of {P * SPATIAL_COMPRESSION}, and pre-encoded so"
        )
    return frames, height // P, width // P


def _of_groups(vectors: Tensor, grid: Grid, share: SequenceShard) -> Tensor:
    """The vectors of latent frames, [B, F, n, D], as those of equal groups of neighbouring tokens, [B, G, n, D]: of a
    shared row those of this rank's part. A group is the whole row where it has one vector, else a frame, or the largest
    piece of one that the part is made of."""
    if vectors.shape[1] == 1:
        return vectors
    cells, (start, stop, _) = grid[1] * grid[2], share.own.indices(prod(grid))
    first, size = start // cells, gcd(cells, start, stop)  # a cut from the whole row would keep all of it
    pieces = vectors[:, first : -(-stop // cells)].repeat_interleave(cells // size, 1)
    return pieces[:, (start - first * cells) // size : (stop - first * cells) // size]


def fold_latents(x: Tensor) -> Tensor:
    """[B, C, F, h, w] to [B, L, C*P*P]: one token per P x P cells and latent frame."""
    b, c, f, h, w = x.shape
    patches = x.reshape(b, c, f, h // P, P, w // P, P)
    return patches.permute(0, 2, 3, 5, 1, 4, 6).reshape(b, -1, c * P * P)


def unfold_latents(tokens: Tensor, grid: Grid) -> Tensor:
    """The inverse of `fold_latents`."""
    f, h, w = grid
    patches = tokens.reshape(tokens.shape[0], f, h, w, -1, P, P)
    return patches.permute(0, 4, 1, 2, 5, 3, 6).reshape(tokens.shape[0], -1, f, h * P, w * P)


def token_positions(grid: Grid, device: torch.device) -> Tensor:
    """(clip, row, column) of every token, [L, 3]: content and motion of a clip are at one place."""
    axes = [torch.arange(length, device=device) for length in grid]
    axes[0] = axes[0] // FRAMES_PER_CLIP
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)


def padded_text(text: Tensor, mask: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """Text [B, M, Dt] and mask [B, M] with room for the next multiple of tokens, which do not count."""
    more = -text.shape[1] % multiple
    return (F.pad(text, (0, 0, 0, more)), F.pad(mask, (0, more))) if more else (text, mask)


class KindEmbedding(nn.Module):
    """Distinguishes content from motion: one learned vector for each, added to every token of its frames."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(0.02 * torch.randn(FRAMES_PER_CLIP, width))

    def forward(self, tokens: Tensor, grid: Grid, share: SequenceShard = WHOLE) -> Tensor:
        """tokens [B, L, D]; of a shared row this rank's part."""
        kinds = torch.arange(grid[0], device=tokens.device) % FRAMES_PER_CLIP
        return tokens + self.table[kinds].repeat_interleave(grid[1] * grid[2], 0)[share.own]  # [B, L, D] + [L, D]


class FramePlace(nn.Module):
    """Positional embedding of every token within its frame, as shares of the frame's height and width, added to the
    tokens.

    Ours: rotary positions tell tokens apart from each other, not from the border, which every object keeps away from.
    Shares instead of a table, so that any size can be taken. Adds nothing at the start.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = ZeroLinear(4 * _PLACE_OCTAVES, width)

    def forward(self, tokens: Tensor, grid: Grid, share: SequenceShard = WHOLE) -> Tensor:
        """tokens [B, L, D]; of a shared row this rank's part."""
        waves = frame_places(grid, tokens.device)[share.own].to(tokens.dtype)  # [L, 4*octaves]
        return tokens + self.project(waves)  # type: ignore[no-any-return]


def frame_places(grid: Grid, device: torch.device) -> Tensor:
    """Sinusoids of each token's centre in its frame, [L, 4*octaves]: half a turn to eight half turns over a side."""
    centres = [(torch.arange(length, device=device) + 0.5) / length for length in grid]
    _, rows, columns = torch.meshgrid(*centres, indexing="ij")
    places = torch.stack([rows, columns], -1).flatten(0, 2)  # [L, 2]
    octaves = pi * 2.0 ** torch.arange(_PLACE_OCTAVES, device=device, dtype=torch.float32)
    angles = (places[..., None] * octaves).flatten(1)  # [L, 2*octaves]
    return torch.cat([angles.cos(), angles.sin()], -1)


class TextProjection(nn.Module):
    """The text encoder's tokens to the transformer's width, [B, M, Dt] to [B, M, D] (caption projection of PixArt)."""

    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.expand = nn.Linear(text_width, width)
        self.out = nn.Linear(width, width)

    def forward(self, text: Tensor) -> Tensor:
        return self.out(F.gelu(self.expand(text), approximate="tanh"))  # type: ignore[no-any-return]


class SelfAttention(nn.Module):
    """Every token sees every token of the row; queries and keys are normed per head (SD3, Sec. 5.3.2), then turned."""

    def __init__(self, config: T2VModelConfig) -> None:
        super().__init__()
        self.heads, self.attention = config.heads, config.attention
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.norm_q, self.norm_k = (nn.RMSNorm(config.width // config.heads, eps=_NORM_EPS) for _ in range(2))
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, positions: RotaryAngles, grid: Grid, share: SequenceShard = WHOLE) -> Tensor:
        """x [B, L, D]; of a shared row this rank's part, at its positions."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # [B, L, N, E] each
        q, k = rotate(self.norm_q(q), positions), rotate(self.norm_k(k), positions)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))  # [B, N, L, E] each
        mixed = attention(q, k, v, grid, self.attention, share=share)
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class CrossAttention(nn.Module):
    """Every token sees the text. Starts closed: its output is zero until the last projection has learned something."""

    def __init__(self, config: T2VModelConfig) -> None:
        super().__init__()
        self.heads, self.backend = config.heads, config.attention.backend
        self.q = nn.Linear(config.width, config.width)
        self.kv = nn.Linear(config.width, 2 * config.width)
        self.norm_q, self.norm_k = (nn.RMSNorm(config.width // config.heads, eps=_NORM_EPS) for _ in range(2))
        self.out = ZeroLinear(config.width, config.width)

    def forward(self, x: Tensor, text: Tensor, counting: TextTokens) -> Tensor:
        """x [B, L, D], text [B, M, D], of whose tokens `counting` count."""
        q = self.norm_q(self.q(x).unflatten(-1, (self.heads, -1))).transpose(1, 2)  # [B, N, L, E]
        k, v = self.kv(text).unflatten(-1, (2, self.heads, -1)).unbind(2)  # [B, M, N, E] each
        mixed = cross_attention(q, self.norm_k(k).transpose(1, 2), v.transpose(1, 2), counting, self.backend)
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class TextToVideoBlock(nn.Module):
    """Self-attention and a two-layer network behind adaLN gates; between them, ungated, attention to the text."""

    def __init__(self, config: T2VModelConfig) -> None:
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.table = nn.Parameter(torch.zeros(6, width))
        self.self_attention = SelfAttention(config)
        self.cross_attention = CrossAttention(config)
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        text: Tensor,
        counting: TextTokens,
        positions: RotaryAngles,
        grid: Grid,
        share: SequenceShard = WHOLE,
    ) -> Tensor:
        """x [B, L, D], of a shared row this rank's part; modulation [B, G, 6, D] of G groups of its tokens, text
        [B, M, D]."""
        parts = (modulation + self.table).unsqueeze(3).unbind(2)  # six of [B, G, 1, D]
        groups = x.unflatten(1, (modulation.shape[1], -1))  # [B, G, L / G, D]: a modulation is never spread over tokens
        mixed = self.self_attention(modulate(groups, parts[0], parts[1]).flatten(1, 2), positions, grid, share)
        x = torch.addcmul(groups, parts[2], mixed.view_as(groups)).flatten(1, 2)
        groups = (x + self.cross_attention(F.layer_norm(x, x.shape[-1:]), text, counting)).view_as(groups)
        hidden = F.gelu(self.expand(modulate(groups, parts[3], parts[4])), approximate="tanh")
        return torch.addcmul(groups, parts[5], self.contract(hidden)).flatten(1, 2)


class TextToVideo(Checkpointed, RowSharing):
    """Noisy normalised latents, diffusion time and text to the velocity of the rectified flow.

    Zero at the start. Any even sides and any number of clips are taken: positions are relative, or shares of
    the frame, and there is no table.
    """

    def __init__(self, config: T2VModelConfig) -> None:
        super().__init__()
        self.config, values = config, config.latent_channels * P * P
        self.embed = nn.Linear(values, config.width)
        self.kind = KindEmbedding(config.width)
        self.place = FramePlace(config.width)
        self.text = TextProjection(config.text_width, config.width)
        self.timestep = TimestepEmbedding(config.width)
        self.modulation = Modulation(config.width, 6)
        self.blocks = nn.ModuleList(TextToVideoBlock(config) for _ in range(config.blocks))
        self.final_modulation = Modulation(config.width, 2)
        self.head = ZeroLinear(config.width, values)

    def forward(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """One prediction; computed in the dtype of the weights.

        Args:
            x: [B, C, F, h, w], the frames of n clips in the order content, motion, content, motion, ...; an image has
                F = 1.
            t: diffusion time in (0, 1], [B]; or one for each latent frame, [B, F], 0 where a frame is given clean.
            text: embeddings [B, M, Dt]; of a caption that was dropped, those of the empty caption.
            mask: [B, M], bool or numbers, true where a text token counts; what lies elsewhere changes nothing.

        Returns:
            The velocity, [B, C, F, h, w] in float32.

        Raises:
            DataError: odd sides, or channels or text of another width than the config's, or times of other frames.
            BackendError: the attention backend cannot run here.
        """
        grid, dtype = self._checked_grid(x, text), self.embed.weight.dtype
        share = self.rows.share(prod(grid))
        positions = rotary_angles(token_positions(grid, x.device)[share.own], self.config.width // self.config.heads)
        tokens = self.kind(self.embed(fold_latents(x.to(dtype))[:, share.own]), grid, share)  # [B, L, D]
        tokens = self.place(tokens, grid, share)
        text, mask = padded_text(text, mask, _TEXT_MULTIPLE.get(x.device.type, 1))
        counting = text_tokens(mask.bool(), self.config.attention.backend)
        text, vectors = self.text(text.to(dtype)), self._times(t, grid)  # [B, M, D], [B, 1 or F, D]
        modulation = _of_groups(self.modulation(vectors), grid, share)  # [B, G, 6, D]
        for block in self.blocks:
            tokens = self.run(block, tokens, modulation, text, counting, positions, grid=grid, share=share)
        scale, shift = _of_groups(self.final_modulation(vectors), grid, share).unsqueeze(3).unbind(2)
        groups = tokens.unflatten(1, (scale.shape[1], -1))
        velocities = share.whole(self.head(modulate(groups, scale, shift)).flatten(1, 2))
        return unfold_latents(velocities.float(), grid)

    def set_activation_checkpointing(self, enabled: Recomputation) -> None:
        """Recompute activations in the backward pass instead of keeping them; "selective": all but attention's."""
        recompute_activations(self, enabled)

    def _times(self, t: Tensor, grid: Grid) -> Tensor:
        """The vectors of the times [B] or [B, F]: [B, 1, D] or [B, F, D]."""
        if t.ndim == 2 and t.shape[1] != grid[0]:
            raise DataError(f"times of {t.shape[1]} latent frames, the row has {grid[0]}; give one time for each")
        per_row = t if t.ndim == 2 else t[:, None]
        return self.timestep(per_row.flatten()).unflatten(0, per_row.shape)  # type: ignore[no-any-return]

    def _checked_grid(self, x: Tensor, text: Tensor) -> Grid:
        channels, width = self.config.latent_channels, self.config.text_width
        if x.ndim != 5 or x.shape[1] != channels:
            raise DataError(
                f"latents have the shape [batch, {channels}, frames, h, w], found {list(x.shape)}; "
                "model.latent_channels must be the cache's"
            )
        if text.ndim != 3 or text.shape[2] != width:
            raise DataError(
                f"text has the shape [batch, tokens, {width}], found {list(text.shape)}; "
                "model.text_width must be the cache's"
            )
        return token_grid((x.shape[2], x.shape[3], x.shape[4]))
