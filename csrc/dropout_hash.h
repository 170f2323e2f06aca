// The dropout mask of an adapter's input: the same mask on every device and for every split of the columns.
//     mask[i, j] = 0 if hash(seed, index) < 2^32 probability, else 1 / (1 - probability)
//     index = first_index + i * row_stride + j
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "index_hash.h"

namespace megatron_step {

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
    return index_hash(static_cast<uint32_t>(i), index_key(seed, i)) >= threshold ? scale : 0.0f;
  }
};

}  // namespace megatron_step
