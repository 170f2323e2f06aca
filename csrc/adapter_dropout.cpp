// Dropout of an adapter's input from an element's index alone: x [rows, columns] is a part of a whole x, row_stride
// columns wide, so that every split of it draws parts of one mask, and nothing is stored for backward.
//     y[i, j] = mask[i, j] * x[i, j],   mask[i, j] = 0 if hash(seed, index) < 2^32 probability, else 1 / (1 - probability)
//     index = first_index + i * row_stride + j
// ops/adapter_linear.py has the same hash in plain torch, bit for bit.
#include "operations.h"

namespace megatron_step {
namespace {

struct Words {
  uint32_t low, high;
};

// SplitMix64 (Steele et al., 2014).
Words seed_words(uint64_t seed) {
  uint64_t z = seed + 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  z ^= z >> 31;
  return {static_cast<uint32_t>(z), static_cast<uint32_t>(z >> 32)};
}

// triple32 (https://github.com/skeeto/hash-prospector) with a key before and one after its first round.
inline uint32_t hash(uint32_t h, Words key) {
  h ^= key.low;
  h = (h ^ (h >> 17)) * 0xED5AD4BBu;
  h = ((h ^ (h >> 11)) + key.high) * 0xAC4C1B51u;
  h = (h ^ (h >> 15)) * 0x31848BABu;
  return h ^ (h >> 14);
}

// Elements whose indices agree in their upper word, from `index` on.
template <typename scalar_t>
void drop(const scalar_t* x, scalar_t* y, uint32_t index, uint32_t count, Words key, uint32_t threshold, float scale) {
#pragma omp simd
  for (uint32_t j = 0; j < count; ++j) {
    y[j] = from_float<scalar_t>(to_float(x[j]) * (hash(index + j, key) >= threshold ? scale : 0.0f));
  }
}

template <typename scalar_t>
void drop_row(const scalar_t* x, scalar_t* y, uint64_t index, uint64_t columns, Words seed, uint32_t threshold,
              float scale) {
  while (columns > 0) {
    const uint64_t count = std::min(columns, (uint64_t{1} << 32) - (index & 0xFFFFFFFFu));
    const Words key = {seed.low, seed.high + static_cast<uint32_t>(index >> 32) * 0x9E3779B9u};
    drop(x, y, static_cast<uint32_t>(index), static_cast<uint32_t>(count), key, threshold, scale);
    x += count, y += count, index += count, columns -= count;
  }
}

}  // namespace

at::Tensor adapter_dropout(const at::Tensor& x, double probability, int64_t seed, int64_t first_index,
                           int64_t row_stride) {
  const at::Tensor input = x.contiguous();
  at::Tensor y = at::empty(input.sizes(), input.options());
  const int64_t columns = input.size(-1), rows = columns > 0 ? input.numel() / columns : 0;
  const Words key = seed_words(static_cast<uint64_t>(seed));
  const auto threshold = static_cast<uint32_t>(std::min(std::nearbyint(probability * 0x1p32), 0x1p32 - 1));
  const auto scale = static_cast<float>(1 / (1 - probability));
  MEGATRON_STEP_DISPATCH(input, "adapter_dropout", [&] {
    at::parallel_for(0, rows, at::divup(16384, std::max<int64_t>(columns, 1)), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        drop_row(input.const_data_ptr<scalar_t>() + row * columns, y.mutable_data_ptr<scalar_t>() + row * columns,
                 static_cast<uint64_t>(first_index + row * row_stride), static_cast<uint64_t>(columns), key, threshold,
                 scale);
      }
    });
  });
  return y;
}

}  // namespace megatron_step
