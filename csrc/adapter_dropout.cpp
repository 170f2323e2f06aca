// Dropout of an adapter's input, computed from each element's index: x [rows, columns] is a part of a whole x, row_stride
// columns wide. So every split of the whole x draws parts of one mask, and nothing is stored for backward.
//     y[i, j] = mask[i, j] * x[i, j]             the mask: dropout_hash.h
#include "dropout_hash.h"
#include "operations.h"

namespace megatron_step {
namespace {

// Elements from `index` on whose indices have the same upper word.
template <typename scalar_t>
void drop(const scalar_t* x, scalar_t* y, uint32_t index, uint32_t count, Words key, uint32_t threshold, float scale) {
#pragma omp simd
  for (uint32_t j = 0; j < count; ++j) {
    y[j] = from_float<scalar_t>(to_float(x[j]) * (index_hash(index + j, key) >= threshold ? scale : 0.0f));
  }
}

template <typename scalar_t>
void drop_row(const scalar_t* x, scalar_t* y, uint64_t index, uint64_t columns, const Dropout& dropout) {
  while (columns > 0) {
    const uint64_t count = std::min(columns, (uint64_t{1} << 32) - (index & 0xFFFFFFFFu));
    drop(x, y, static_cast<uint32_t>(index), static_cast<uint32_t>(count), index_key(dropout.seed, index),
         dropout.threshold, dropout.scale);
    x += count, y += count, index += count, columns -= count;
  }
}

}  // namespace

at::Tensor adapter_dropout(const at::Tensor& x, double probability, int64_t seed, int64_t first_index,
                           int64_t row_stride) {
  const at::Tensor input = x.contiguous();
  at::Tensor y = at::empty(input.sizes(), input.options());
  const int64_t columns = input.size(-1), rows = columns > 0 ? input.numel() / columns : 0;
  const Dropout dropout(probability, seed, first_index, row_stride);
  MEGATRON_STEP_DISPATCH(input, "adapter_dropout", [&] {
    at::parallel_for(0, rows, at::divup(16384, std::max<int64_t>(columns, 1)), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        drop_row(input.const_data_ptr<scalar_t>() + row * columns, y.mutable_data_ptr<scalar_t>() + row * columns,
                 dropout.index(row, 0), static_cast<uint64_t>(columns), dropout);
      }
    });
  });
  return y;
}

}  // namespace megatron_step
