// Functions on blocks of an attention head in fp32: copy blocks from a tensor's rows, multiply them, and store them as
// rows. attention.cpp pads the blocks with zeros, so that the products need no remainder loops.
#pragma once

#include "operations.h"
#include "vector.h"

#include <initializer_list>
#include <optional>

namespace megatron_step {

constexpr int64_t kTileRows = 4, kVectors = kRegisters / 2 / kTileRows;  // a tile of sums takes half the registers
constexpr int64_t kQueries = 32, kKeys = 128;                            // one block; scores of a block are 16 KiB
constexpr int64_t kDepth = 64;                                           // terms of a product that are summed separately

// Zeros that begin on a cache line. If a row's length is a multiple of the lanes, none of the row's vectors crosses a
// cache line.
class Buffer {
 public:
  explicit Buffer(int64_t size) : lines_(at::divup(size, 16)), size_(size) {}
  float* data() { return lines_.front().values; }
  void clear() { std::fill_n(data(), size_, 0.0f); }

 private:
  struct alignas(64) Line {
    float values[16] = {};
  };
  std::vector<Line> lines_;
  int64_t size_;
};

inline int64_t round_up(int64_t value, int64_t multiple) { return at::divup(value, multiple) * multiple; }

// c[4, V * lanes] (+)= a[4, depth] b[depth, V * lanes]; a(i, p) lies at a[i * a_row + p * a_column]. The product is summed
// separately before it is added to c, so that sums over many blocks have the error of short sums.
template <int64_t V>
inline void multiply_tile(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c,
                          int64_t c_row, int64_t depth, bool accumulate) {
  Vector sum[kTileRows][V] = {};
  add_product(sum, a, a_row, a_column, b, b_row, depth);
  for (int64_t i = 0; i < kTileRows; ++i) {
    for (int64_t j = 0; j < V; ++j) {
      float* target = c + i * c_row + j * kLanes;
      store(target, accumulate ? load(target) + sum[i][j] : sum[i][j]);
    }
  }
}

// All tiles of V vectors from column j on; returns the first column left.
template <int64_t V>
int64_t multiply_columns(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c,
                         int64_t c_row, int64_t rows, int64_t columns, int64_t depth, bool accumulate, int64_t j) {
  for (; columns - j >= V * kLanes; j += V * kLanes) {
    for (int64_t i = 0; i < rows; i += kTileRows) {
      multiply_tile<V>(a + i * a_row, a_row, a_column, b + j, b_row, c + i * c_row + j, c_row, depth, accumulate);
    }
  }
  return j;
}

// c[rows, columns] (+)= a[rows, depth] b[depth, columns]; rows a multiple of 4, columns of the lanes.
inline void multiply(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, float* c,
                     int64_t c_row, int64_t rows, int64_t columns, int64_t depth, bool accumulate) {
  for (int64_t p = 0; p < depth; p += kDepth, a += kDepth * a_column, b += kDepth * b_row, accumulate = true) {
    const int64_t d = std::min(kDepth, depth - p);
    int64_t j = multiply_columns<kVectors>(a, a_row, a_column, b, b_row, c, c_row, rows, columns, d, accumulate, 0);
    j = multiply_columns<2>(a, a_row, a_column, b, b_row, c, c_row, rows, columns, d, accumulate, j);
    multiply_columns<1>(a, a_row, a_column, b, b_row, c, c_row, rows, columns, d, accumulate, j);
  }
}

// One head [s, d] of a tensor [s, b, n, d] whose last dimension is contiguous.
template <typename scalar_t>
struct Head {
  scalar_t* data;
  int64_t row;

  template <typename tensor_t>
  Head(const tensor_t& tensor, scalar_t* base, int64_t batch, int64_t head)
      : data(base + batch * tensor.stride(1) + head * tensor.stride(2)), row(tensor.stride(0)) {}
};

// Prefetches rows [begin, end) of a head, because the processor does not prefetch rows that are a page or more apart.
template <typename scalar_t>
void prefetch_rows(const Head<const scalar_t>& source, int64_t begin, int64_t end, int64_t d) {
  for (int64_t i = begin; i < end; ++i) {
    const scalar_t* row = source.data + i * source.row;
    for (int64_t j = 0; j < d; j += 64 / sizeof(scalar_t)) {
      __builtin_prefetch(row + j, 0, 2);  // for reading, into the second level
    }
  }
}

// target[rows_padded, width] = source[begin : begin + rows, :d] in fp32, zeros elsewhere.
template <typename scalar_t>
void copy_rows(const Head<const scalar_t>& source, int64_t begin, int64_t rows, int64_t rows_padded, int64_t d,
               int64_t width, float* target) {
  for (int64_t i = 0; i < rows_padded; ++i) {
    float* out = target + i * width;
    const int64_t used = i < rows ? d : 0;
    const scalar_t* in = source.data + (begin + (i < rows ? i : 0)) * source.row;
#pragma omp simd
    for (int64_t j = 0; j < used; ++j) {
      out[j] = to_float(in[j]);
    }
    std::fill(out + used, out + width, 0.0f);
  }
}

// target[:rows, :d] = factor * source[rows, width], back in the tensor's type.
template <typename scalar_t>
void store_rows(const float* source, int64_t rows, int64_t d, int64_t width, float factor, const Head<scalar_t>& target,
                int64_t begin) {
  for (int64_t i = 0; i < rows; ++i) {
    scalar_t* out = target.data + (begin + i) * target.row;
#pragma omp simd
    for (int64_t j = 0; j < d; ++j) {
      out[j] = from_float<scalar_t>(factor * source[i * width + j]);
    }
  }
}

// The sum of x_i y_i in the order in which `multiply` adds. If one key has nearly all the weight, out is nearly this key's
// value, and delta is nearly this key's dout v^T. Summed in the same order, both have nearly equal errors, which cancel.
inline float dot(const float* x, const float* y, int64_t size) {
  float sum = 0.0f;
  for (int64_t begin = 0; begin < size; begin += kDepth) {
    float part = 0.0f;
    for (int64_t i = begin; i < std::min(begin + kDepth, size); ++i) {
      part += x[i] * y[i];
    }
    sum += part;
  }
  return sum;
}

// The data that the query heads of a group share; `group` counts over the whole batch.
template <typename scalar_t>
struct KeysAndValues {
  Head<const scalar_t> keys, values;

  KeysAndValues(const at::Tensor& k, const at::Tensor& v, int64_t group)
      : keys(k, k.const_data_ptr<scalar_t>(), group / k.size(2), group % k.size(2)),
        values(v, v.const_data_ptr<scalar_t>(), group / v.size(2), group % v.size(2)) {}
};

// Sizes of one head's work: s and d padded to whole blocks and vectors.
struct Shape {
  int64_t s, d, s_padded, width;
  Shape(int64_t s, int64_t d) : s(s), d(d), s_padded(round_up(s, kKeys)), width(round_up(d, kLanes)) {}
};

// target[width, s_padded] = source[s_padded, width] transposed, a few rows at a time, so that they stay in the cache.
inline void transpose_rows(const float* source, const Shape& shape, float* target) {
  for (int64_t i = 0; i < shape.s_padded; i += kLanes) {
    transpose_block(source + i * shape.width, shape.width, target + i, shape.s_padded, kLanes, shape.width);
  }
}

// Prefetches, during a block of queries, the data of the next block and a part of the next group.
template <typename scalar_t>
void prefetch_block(std::initializer_list<const Head<const scalar_t>*> sources,
                    const std::optional<KeysAndValues<scalar_t>>& next, int64_t query0, const Shape& shape) {
  const int64_t following = std::min(query0 + kQueries, shape.s);
  for (const Head<const scalar_t>* source : sources) {
    prefetch_rows(*source, following, std::min(following + kQueries, shape.s), shape.d);
  }
  if (next) {
    prefetch_rows(next->keys, query0, following, shape.d);
    prefetch_rows(next->values, query0, following, shape.d);
  }
}

}  // namespace megatron_step
