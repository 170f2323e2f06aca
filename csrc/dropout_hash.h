// Which elements of an adapter's input are dropped: one hash for every device, so that they all draw the same mask.
//     mask[i, j] = 0 if hash(seed, index) < 2^32 probability, else 1 / (1 - probability)
//     index = first_index + i * row_stride + j
// ops/adapter_dropout.py has the same hash in plain torch, bit for bit.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define MEGATRON_STEP_ANYWHERE __host__ __device__ __forceinline__
#else
#define MEGATRON_STEP_ANYWHERE inline
#endif

namespace megatron_step {

struct Words {
  uint32_t low, high;
};

// SplitMix64 (Steele et al., 2014).
inline Words seed_words(uint64_t seed) {
  uint64_t z = seed + 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  z ^= z >> 31;
  return {static_cast<uint32_t>(z), static_cast<uint32_t>(z >> 32)};
}

// The key of all indices that agree in their upper word.
MEGATRON_STEP_ANYWHERE Words dropout_key(Words seed, uint64_t index) {
  return {seed.low, seed.high + static_cast<uint32_t>(index >> 32) * 0x9E3779B9u};
}

// triple32 (https://github.com/skeeto/hash-prospector) of an index' lower word, with a key before and one after its
// first round.
MEGATRON_STEP_ANYWHERE uint32_t dropout_hash(uint32_t h, Words key) {
  h ^= key.low;
  h = (h ^ (h >> 17)) * 0xED5AD4BBu;
  h = ((h ^ (h >> 11)) + key.high) * 0xAC4C1B51u;
  h = (h ^ (h >> 15)) * 0x31848BABu;
  return h ^ (h >> 14);
}

// The mask of an x [rows, columns] that is part of a whole one, row_stride columns wide.
struct Dropout {
  Words seed;
  uint32_t threshold;  // 0: nothing is dropped
  float scale;
  uint64_t first_index, row_stride;

  Dropout(double probability, int64_t seed, int64_t first_index, int64_t row_stride)
      : seed(seed_words(static_cast<uint64_t>(seed))),
        threshold(static_cast<uint32_t>(std::min(std::nearbyint(probability * 0x1p32), 0x1p32 - 1))),
        scale(static_cast<float>(1 / (1 - probability))),
        first_index(static_cast<uint64_t>(first_index)),
        row_stride(static_cast<uint64_t>(row_stride)) {}

  MEGATRON_STEP_ANYWHERE uint64_t index(int64_t row, int64_t column) const {
    return first_index + static_cast<uint64_t>(row) * row_stride + static_cast<uint64_t>(column);
  }

  MEGATRON_STEP_ANYWHERE float mask(int64_t row, int64_t column) const {
    const uint64_t i = index(row, column);
    return dropout_hash(static_cast<uint32_t>(i), dropout_key(seed, i)) >= threshold ? scale : 0.0f;
  }
};

}  // namespace megatron_step
