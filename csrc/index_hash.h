// Random bits of an element from a seed and the element's index: one hash for every device, thread and layout.
// ops/index_hash.py has the same hash in plain torch, bit for bit.
#pragma once

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
MEGATRON_STEP_ANYWHERE Words index_key(Words seed, uint64_t index) {
  return {seed.low, seed.high + static_cast<uint32_t>(index >> 32) * 0x9E3779B9u};
}

// triple32 (https://github.com/skeeto/hash-prospector) of an index' lower word, with a key before and one after its
// first round.
MEGATRON_STEP_ANYWHERE uint32_t index_hash(uint32_t h, Words key) {
  h ^= key.low;
  h = (h ^ (h >> 17)) * 0xED5AD4BBu;
  h = ((h ^ (h >> 11)) + key.high) * 0xAC4C1B51u;
  h = (h ^ (h >> 15)) * 0x31848BABu;
  return h ^ (h >> 14);
}

}  // namespace megatron_step
