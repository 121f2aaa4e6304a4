"""llm.c's random streams, bit for bit on the host: mt19937 with torch's normals, and xorshift*.

NumPy's legacy MT19937 is the same generator with the same seeding; what is added here is llm.c's way of turning
its 32-bit draws into uniforms, normals and permutations, and the C struct in which it saves itself.
"""

from __future__ import annotations

import math

import numpy as np

from gpt2_jax.errors import Gpt2JaxError

_STATE_WORDS = 624
# llm.c's mt19937_state as it lies in memory and in a training state file: 2520 bytes.
GENERATOR_STRUCT = np.dtype(
    [("seed", "<u8"), ("left", "<i4"), ("next", "<u4"), ("state", "<u4", _STATE_WORDS), ("matrix", "<u4", 2)]
)
_MATRIX = (0, 0x9908B0DF)
_NORMAL_CHUNK = 1 << 20  # elements turned into normals at a time: bounds the float64 temporaries


class Mt19937:
    """mt19937 as in llm.c's llmc/rand.h, which follows torch's CPU generator."""

    def __init__(self, seed: int):
        self._bits = np.random.MT19937()
        self._set(np.random.RandomState(seed).get_state(legacy=False)["state"]["key"], _STATE_WORDS)
        self._fresh = True  # NumPy cannot tell a seeded generator from one that just used up its 624 words

    def _set(self, key: np.ndarray, position: int) -> None:
        self._bits.state = {"bit_generator": "MT19937", "state": {"key": key, "pos": position}}

    def draws(self, count: int) -> np.ndarray:
        """The next `count` 32-bit draws, uint32."""
        if count:
            self._fresh = False
        return self._bits.random_raw(count).astype(np.uint32)

    def permute(self, values: np.ndarray) -> None:
        """Fisher-Yates in place, from the top index down with j = draw mod (i + 1)."""
        indices = np.arange(len(values) - 1, 0, -1)
        targets = self.draws(len(indices)) % (indices + 1)
        for i, j in zip(indices.tolist(), targets.tolist(), strict=True):
            values[i], values[j] = values[j], values[i]

    def uniforms(self, count: int) -> np.ndarray:
        """float32 in [0, 1): the low 24 bits of a draw over 2^24."""
        return (self.draws(count) & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2**-24)

    def fill_normal(self, out: np.ndarray, std: float) -> None:
        """Fill `out` (any length, float32, one row) with Normal(0, std) by torch's CPU algorithm.

        From 16 elements on: all uniforms first, then Box-Muller in blocks of 16, element t with t + 8; if 16 does not
        divide the length, the last 16 are drawn anew. Below 16: pairs from 53-bit uniforms.
        """
        if out.size < 16:
            self._fill_few_normals(out, std)
            return
        for start in range(0, out.size, _NORMAL_CHUNK):
            chunk = out[start : start + _NORMAL_CHUNK]
            chunk[:] = self.uniforms(chunk.size)
            whole = chunk[: chunk.size // 16 * 16]
            whole[:] = _box_muller(whole, std)
        if out.size % 16:
            out[-16:] = _box_muller(self.uniforms(16), std)

    def _fill_few_normals(self, out: np.ndarray, std: float) -> None:
        for t in range(0, out.size, 2):
            high_low = self.draws(4).astype(np.uint64).reshape(2, 2)
            u1, u2 = ((high_low[:, 0] << 32 | high_low[:, 1]) & (2**53 - 1)) * 2.0**-53
            radius, theta = math.sqrt(-2.0 * math.log1p(-u2)), 2.0 * math.pi * u1
            pair = np.array([radius * math.cos(theta), radius * math.sin(theta)]) * std
            out[t : t + 2] = pair[: out.size - t]

    def to_struct(self) -> np.ndarray:
        """llm.c's struct, a GENERATOR_STRUCT scalar; the seed, which llm.c never initialises, is zero."""
        state = self._bits.state["state"]
        next_word = 0 if self._fresh else int(state["pos"])
        left = 1 if self._fresh else _STATE_WORDS + 1 - next_word
        return np.array((0, left, next_word, state["key"], _MATRIX), dtype=GENERATOR_STRUCT)

    @classmethod
    def from_struct(cls, struct: np.ndarray) -> Mt19937:
        """The generator that `to_struct` saved. Raises Gpt2JaxError for words that no generator of this kind can have."""
        if tuple(struct["matrix"].tolist()) != _MATRIX:
            raise Gpt2JaxError(f"mt19937 state: expected the matrix words {_MATRIX}, found {tuple(struct['matrix'].tolist())}")
        left, next_word = int(struct["left"]), int(struct["next"])
        fresh = (left, next_word) == (1, 0)
        if not fresh and not (1 <= next_word <= _STATE_WORDS and left == _STATE_WORDS + 1 - next_word):
            raise Gpt2JaxError(f"mt19937 state: expected left = 625 - next with next 1 to 624, found {left} and {next_word}")
        generator = cls(0)
        generator._set(struct["state"].astype(np.uint32), _STATE_WORDS if fresh else next_word)
        generator._fresh = fresh
        return generator


def _box_muller(uniforms: np.ndarray, std: float) -> np.ndarray:
    """Normals (n,) float32 from uniforms (n,), n a multiple of 16. Logarithm, sine and cosine go through float64 and
    are rounded once, as close to C's logf, sinf and cosf as NumPy gets on every processor."""
    blocks = uniforms.reshape(-1, 2, 8)
    u1, u2 = np.float32(1) - blocks[:, 0], blocks[:, 1]
    log_u1 = np.log((u1 + np.float32(1e-12)).astype(np.float64)).astype(np.float32)
    radius = np.sqrt(np.float32(-2) * log_u1)
    theta = (2.0 * np.pi * u2.astype(np.float64)).astype(np.float32).astype(np.float64)
    normals = np.empty_like(blocks)
    normals[:, 0] = radius * np.cos(theta).astype(np.float32)
    normals[:, 1] = radius * np.sin(theta).astype(np.float32)
    return (normals * np.float32(std)).reshape(-1)


class XorShift:
    """The 64-bit xorshift* generator that llm.c samples text with."""

    def __init__(self, state: int):
        self.state = state

    def draw(self) -> int:
        """The next 32-bit draw."""
        self.state ^= self.state >> 12
        self.state ^= (self.state << 25) & 0xFFFFFFFFFFFFFFFF
        self.state ^= self.state >> 27
        return (self.state * 0x2545F4914F6CDD1D & 0xFFFFFFFFFFFFFFFF) >> 32

    def uniform(self) -> np.float32:
        """A float32 in [0, 1): the high 24 bits of a draw over 2^24."""
        return np.float32((self.draw() >> 8) / 2**24)
