// target [t, n] += s u factor, in place, with u [t, r] and factor [r, n], all float32: the adapter's term of a linear.
// Reading and writing target takes most of the time, so a tile of it stays in the L1 cache while all r terms are added. A few
// terms are summed in registers and then added to it: short sums round less than one long sum.
#include "operations.h"
#include "vector.h"

#include <ATen/ops/mul.h>

namespace megatron_step {
namespace {

constexpr int64_t kRows = 8, kVectors = kRegisters / 2 / kRows;  // a tile of target takes half the registers
constexpr int64_t kTerms = 32;                                   // of a sum in registers
constexpr int64_t kColumns = 256;                                // so many columns of factor stay in the L1 cache

// target[R, V * lanes] += u[R, r] factor[r, V * lanes]; `next` is the tile that is read next.
template <int64_t R, int64_t V>
void add_tile(float* target, const float* next, const float* u, const float* factor, int64_t r, int64_t n) {
  for (int64_t i = 0; i < R; ++i) {
    for (int64_t v = 0; v < V; ++v) {
      __builtin_prefetch(next + i * n + v * kLanes, 1, 2);
    }
  }
  for (int64_t p = 0; p < r; p += kTerms) {
    Vector sum[R][V] = {};
    add_product(sum, u + p, r, 1, factor + p * n, n, std::min(kTerms, r - p));
    for (int64_t i = 0; i < R; ++i) {
      for (int64_t v = 0; v < V; ++v) {
        float* place = target + i * n + v * kLanes;
        store(place, load(place) + sum[i][v]);
      }
    }
  }
}

// The same for `columns` columns of R rows; the last columns, fewer than the lanes, are computed one by one.
template <int64_t R>
void add_rows(float* target, const float* next, const float* u, const float* factor, int64_t r, int64_t n,
              int64_t columns) {
  int64_t j = 0;
  for (; j + kVectors * kLanes <= columns; j += kVectors * kLanes) {
    add_tile<R, kVectors>(target + j, next + j, u, factor + j, r, n);
  }
  for (; j + kLanes <= columns; j += kLanes) {
    add_tile<R, 1>(target + j, next + j, u, factor + j, r, n);
  }
  for (; j < columns; ++j) {
    for (int64_t i = 0; i < R; ++i) {
      for (int64_t first = 0; first < r; first += kTerms) {
        float sum = 0.0f;
        for (int64_t p = first; p < std::min(first + kTerms, r); ++p) {
          sum += u[i * r + p] * factor[p * n + j];
        }
        target[i * n + j] += sum;
      }
    }
  }
}

}  // namespace

void rank_update_(at::Tensor& target, const at::Tensor& u, const at::Tensor& factor, double scaling) {
  TORCH_CHECK(target.is_contiguous(), "rank_update_: the target must be contiguous");
  const int64_t t = target.size(0), n = target.size(1), r = u.size(1);
  const at::Tensor scaled = scaling == 1.0 ? u.contiguous() : at::mul(u, at::Scalar(scaling)).contiguous();
  const at::Tensor factor_rows = factor.contiguous();
  const float* u_data = scaled.const_data_ptr<float>();
  const float* factor_data = factor_rows.const_data_ptr<float>();
  float* target_data = target.mutable_data_ptr<float>();
  at::parallel_for(0, at::divup(t, kRows), 1, [&](int64_t begin, int64_t end) {
    const int64_t last_row = std::min(end * kRows, t);
    for (int64_t column = 0; column < n; column += kColumns) {
      const int64_t columns = std::min(kColumns, n - column);
      for (int64_t i = begin * kRows; i < last_row; i += kRows) {
        float* here = target_data + i * n + column;
        const float* factor_here = factor_data + column;
        if (i + kRows <= last_row) {
          const float* next = i + 2 * kRows <= last_row ? here + kRows * n : here;
          add_rows<kRows>(here, next, u_data + i * r, factor_here, r, n, columns);
        } else {
          for (int64_t k = 0; k < last_row - i; ++k) {
            add_rows<1>(here + k * n, here, u_data + (i + k) * r, factor_here, r, n, columns);
          }
        }
      }
    }
  });
}

}  // namespace megatron_step
