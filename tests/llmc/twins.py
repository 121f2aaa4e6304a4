"""Plain-Python twins of llm.c's header, generator, normals and loader (llmc/rand.h, llmc/dataloader.h): slow and obvious."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence

import numpy as np

MASK = 0xFFFFFFFF


def header(*words: int) -> bytes:
    """1024 bytes: the first words as given, the others zero."""
    return struct.pack("<256i", *words, *[0] * (256 - len(words)))


class Mersenne:
    """mt19937 that keeps the counters `left` and `next` as llm.c's struct does."""

    def __init__(self, seed: int):
        self.words = [seed]
        for j in range(1, 624):
            previous = self.words[-1]
            self.words.append((1812433253 * (previous ^ previous >> 30) + j) & MASK)
        self.left, self.next = 1, 0

    def draw(self) -> int:
        self.left -= 1
        if self.left == 0:
            self._renew()
        y = self.words[self.next]
        self.next += 1
        y ^= y >> 11
        y ^= y << 7 & 0x9D2C5680
        y ^= y << 15 & 0xEFC60000
        return y ^ y >> 18

    def _renew(self) -> None:
        words = self.words
        for j in range(624):
            y = words[j] & 0x80000000 | words[(j + 1) % 624] & 0x7FFFFFFF
            words[j] = words[(j + 397) % 624] ^ y >> 1 ^ (0x9908B0DF if y & 1 else 0)
        self.left, self.next = 624, 0

    def struct_bytes(self) -> bytes:
        return struct.pack("<QiI624I2I", 0, self.left, self.next, *self.words, 0, 0x9908B0DF)


def permutation(values: Sequence[int], generator: Mersenne) -> list[int]:
    result = list(values)
    for i in range(len(result) - 1, 0, -1):
        j = generator.draw() % (i + 1)
        result[i], result[j] = result[j], result[i]
    return result


def normals(draw: Callable[[], int], count: int, std: float) -> np.ndarray:
    """Normal(0, std) (count,) float32 from 32-bit draws: torch's CPU algorithm, logarithm, sine and cosine in double."""
    if count < 16:
        return _few_normals(draw, count, std)
    values = [_uniform_24(draw) for _ in range(count)]
    for start in range(0, count - 15, 16):
        values[start : start + 16] = _box_muller_16(values[start : start + 16], std)
    if count % 16:
        values[-16:] = _box_muller_16([_uniform_24(draw) for _ in range(16)], std)
    return np.array(values, dtype=np.float32)


def _few_normals(draw: Callable[[], int], count: int, std: float) -> np.ndarray:
    """In double throughout, rounded once at the end."""
    values: list[float] = []
    while len(values) < count:
        u1, u2 = _uniform_53(draw), _uniform_53(draw)
        radius, theta = math.sqrt(-2 * math.log1p(-u2)), 2 * math.pi * u1
        values += [radius * math.cos(theta) * std, radius * math.sin(theta) * std]
    return np.array(values[:count], dtype=np.float32)


def _uniform_24(draw: Callable[[], int]) -> np.float32:
    return np.float32(draw() % 2**24 / 2**24)


def _uniform_53(draw: Callable[[], int]) -> float:
    high = draw()
    return (high << 32 | draw()) % 2**53 / 2**53


def _box_muller_16(uniforms: list[np.float32], std: float) -> list[np.float32]:
    result = list(uniforms)
    for t in range(8):
        u1, u2 = np.float32(1) - uniforms[t], float(uniforms[t + 8])
        logarithm = np.float32(math.log(float(u1 + np.float32(1e-12))))
        radius = np.sqrt(np.float32(-2) * logarithm)
        theta = float(np.float32(2 * math.pi * u2))
        result[t] = radius * np.float32(math.cos(theta)) * np.float32(std)
        result[t + 8] = radius * np.float32(math.sin(theta)) * np.float32(std)
    return result


class LoaderTwin:
    """llm.c's data loader over shards that are already in memory, in the order of their names."""

    def __init__(self, shards: list[np.ndarray], B: int, T: int, *, shuffle: bool, rank: int = 0, num_processes: int = 1):
        self.shards, self.rank_tokens, self.rank, self.num_processes = shards, B * T, rank, num_processes
        self.generator = Mersenne(42 + rank) if shuffle else None
        self.shard_order = list(range(len(shards)))
        self._start_epoch()

    def next_tokens(self) -> list[int]:
        """The B * T + 1 tokens of the next batch."""
        if self.sample == len(self.sample_order):
            if self.place == len(self.shards) - 1:
                self._start_epoch()
            else:
                self._open(self.place + 1)
        first = (self.sample_order[self.sample] * self.num_processes + self.rank) * self.rank_tokens
        self.sample += 1
        return self.shards[self.shard_order[self.place]][first : first + self.rank_tokens + 1].tolist()

    def _start_epoch(self) -> None:
        if self.generator is not None:
            self.shard_order = permutation(self.shard_order, self.generator)
        self._open(0)

    def _open(self, place: int) -> None:
        self.place, self.sample = place, 0
        num_samples = (len(self.shards[self.shard_order[place]]) - 1) // (self.num_processes * self.rank_tokens)
        self.sample_order = list(range(num_samples))
        if self.generator is not None:
            self.sample_order = permutation(self.sample_order, self.generator)


class XorShiftTwin:
    """The xorshift* generator (llm.c llmc/sampler.h)."""

    def __init__(self, state: int):
        self.state = state

    def draw(self) -> int:
        self.state ^= self.state >> 12
        self.state ^= self.state << 25 & 2**64 - 1
        self.state ^= self.state >> 27
        return self.state * 0x2545F4914F6CDD1D >> 32 & MASK


def squirrel(position: int, seed: int) -> int:
    """SquirrelNoise5 (llm.c llmc/cuda_utils.cuh)."""
    bits = position * 0xD2A80A3F + seed & MASK
    bits ^= bits >> 9
    bits = bits + 0xA884F197 & MASK
    bits ^= bits >> 11
    bits = bits * 0x6C736F4B & MASK
    bits ^= bits >> 13
    bits = bits + 0xB79F3ABB & MASK
    bits ^= bits >> 15
    bits = bits * 0x1B56C4F5 & MASK
    return bits ^ bits >> 17
