// Two products of a large x [t, n] with matrices of few columns, as in an adapter's gradients, all float32:
//     s x right [t, r], with right [n, r]        s xᵀ left [n, r], with left [t, r]
// Reading x takes most of the time, and two separate products would read x twice. This kernel reads each element of x once,
// and multiplies it with a row of right and a row of left. If right and left have more columns than a few vectors hold,
// arithmetic takes most of the time instead.
#include "operations.h"
#include "vector.h"

#include <ATen/ops/constant_pad_nd.h>

namespace megatron_step {
namespace {

constexpr int64_t kColumns = 512;                     // columns of x whose rows of right and xᵀ left stay in the caches
constexpr int64_t kChunkRows = 256, kMaxChunks = 32;  // each chunk sums one xᵀ left; the chunks' sums are added in order

// Factors and results of a matrix x of n columns, with rows of w = V * lanes.
struct Operands {
  const float *x, *left, *right;
  float *x_right, *x_left;
  int64_t n;
};

// Adds the products of x[R, columns] at (first_row, column) to R rows of x_right and `columns` rows of x_left. The product
// for x_right is summed separately before it is added, so that sums over many tiles have the error of short sums. `next`
// is the tile that is read next.
template <int64_t R, int64_t V>
void add_tile(const Operands& operands, const float* next, int64_t first_row, int64_t column, int64_t columns) {
  constexpr int64_t w = V * kLanes;
  Vector left[R][V], x_right[R][V] = {};
  const float* x[R];
  for (int64_t i = 0; i < R; ++i) {
    x[i] = operands.x + (first_row + i) * operands.n + column;
    for (int64_t v = 0; v < V; ++v) {
      left[i][v] = load(operands.left + (first_row + i) * w + v * kLanes);
      MEGATRON_STEP_KEEP_IN_REGISTER(left[i][v]);
    }
  }
  const float* right_row = operands.right + column * w;
  float* x_left_row = operands.x_left + column * w;
  for (int64_t c = 0; c < columns; ++c, right_row += w, x_left_row += w) {
    for (int64_t i = 0; i < R && c % 16 == 0; ++i) {
      __builtin_prefetch(next + i * operands.n + c, 0, 2);
    }
    Vector right[V], x_left[V];
    for (int64_t v = 0; v < V; ++v) {
      right[v] = load(right_row + v * kLanes);
      x_left[v] = load(x_left_row + v * kLanes);
      MEGATRON_STEP_KEEP_IN_REGISTER(right[v]);
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < R; ++i) {
      Vector element = Vector{} + x[i][c];
      MEGATRON_STEP_KEEP_IN_REGISTER(element);
      for (int64_t v = 0; v < V; ++v) {
        x_right[i][v] += element * right[v];
        x_left[v] += element * left[i][v];
      }
    }
    for (int64_t v = 0; v < V; ++v) {
      store(x_left_row + v * kLanes, x_left[v]);
    }
  }
  for (int64_t i = 0; i < R; ++i) {
    for (int64_t v = 0; v < V; ++v) {
      float* target = operands.x_right + (first_row + i) * w + v * kLanes;
      store(target, load(target) + x_right[i][v]);
    }
  }
}

// Adds the products of the rows [begin, end) of x.
template <int64_t V>
void add_rows(const Operands& operands, int64_t begin, int64_t end) {
  constexpr int64_t R = std::max<int64_t>(kRegisters / 4 / V, 1);  // rows of left and of x right take half the registers
  const int64_t n = operands.n;
  for (int64_t column = 0; column < n; column += kColumns) {
    const int64_t columns = std::min(kColumns, n - column);
    int64_t i = begin;
    for (; i + R <= end; i += R) {
      const bool is_last_row = i + 2 * R > end, is_last_tile = is_last_row && column + columns == n;
      const float* here = operands.x + i * n + column;
      const float* next = is_last_tile ? here : (is_last_row ? operands.x + begin * n + column + columns : here + R * n);
      add_tile<R, V>(operands, next, i, column, columns);
    }
    for (; i < end; ++i) {
      add_tile<1, V>(operands, operands.x + i * n + column, i, column, columns);
    }
  }
}

// sums[0] = factor * sum of sums[chunks, size] over its chunks, in their order.
void add_chunks(float* sums, int64_t chunks, int64_t size, float factor) {
  at::parallel_for(0, size, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) {
        sums[i] += sums[chunk * size + i];
      }
    }
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
      sums[i] *= factor;
    }
  });
}

// [rows, r] -> [rows, w], contiguous, zeros in the columns from r on.
at::Tensor padded(const at::Tensor& factor, int64_t w) {
  return factor.size(1) == w ? factor.contiguous() : at::constant_pad_nd(factor, {0, w - factor.size(1)}, 0);
}

template <int64_t V>
std::tuple<at::Tensor, at::Tensor> products(const at::Tensor& x, const at::Tensor& left, const at::Tensor& right,
                                            float scaling) {
  constexpr int64_t w = V * kLanes;
  const int64_t t = x.size(0), n = x.size(1), r = left.size(1);
  const int64_t chunk_rows = std::max(kChunkRows, at::divup(t, kMaxChunks));
  const int64_t chunks = std::max<int64_t>(at::divup(t, chunk_rows), 1);
  const at::Tensor left_padded = padded(left, w), right_padded = padded(right, w);
  at::Tensor x_right = at::zeros({t, w}, x.options());
  at::Tensor x_left = at::empty({chunks, n, w}, x.options());
  const Operands all{x.const_data_ptr<float>(),
                     left_padded.const_data_ptr<float>(),
                     right_padded.const_data_ptr<float>(),
                     x_right.mutable_data_ptr<float>(),
                     x_left.mutable_data_ptr<float>(),
                     n};
  at::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      Operands operands = all;
      operands.x_left += chunk * n * w;
      std::fill_n(operands.x_left, n * w, 0.0f);
      add_rows<V>(operands, chunk * chunk_rows, std::min((chunk + 1) * chunk_rows, t));
    }
  });
  add_chunks(all.x_right, 1, t * w, scaling);
  add_chunks(all.x_left, chunks, n * w, scaling);
  return {x_right.narrow(1, 0, r).contiguous(), x_left[0].narrow(1, 0, r).clone()};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> narrow_products(const at::Tensor& x, const at::Tensor& left, const at::Tensor& right,
                                                   double scaling) {
  const at::Tensor rows = x.contiguous();
  switch (at::divup(left.size(1), kLanes)) {
    case 1: return products<1>(rows, left, right, static_cast<float>(scaling));
    case 2: return products<2>(rows, left, right, static_cast<float>(scaling));
    case 3: return products<3>(rows, left, right, static_cast<float>(scaling));
    case 4: return products<4>(rows, left, right, static_cast<float>(scaling));
    default: TORCH_CHECK(false, "narrow_products: ", left.size(1), " columns are more than ", 4 * kLanes);
  }
}

}  // namespace megatron_step
