// The CUDA kernels of the adapter-augmented linear; each is explained in the file of its name.
//
// T is float, c10::BFloat16 or c10::Half. Matrices are row-major without gaps and lie on the current device. Sums over
// many tokens or columns are returned as `parts`, which the caller adds in order. The number of parts depends only on
// shapes, so a result has the same bits in every run and on every GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "dropout_hash.h"

namespace megatron_step {

using Stream = void*;  // a cudaStream_t, without CUDA's headers

constexpr int64_t kTile = 64;  // tokens of a tile, and its columns unless a kernel says otherwise

constexpr int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Length of the parts into which a sum over `length` is split, in whole tiles, if `blocks` thread blocks share the other
// dimensions. The parts are so many that about 512 blocks run, which fill a current GPU about three times, but none is too
// short to be worth a block.
constexpr int64_t part_length(int64_t length, int64_t blocks) {
  constexpr int64_t wanted_blocks = 512, shortest = 4 * kTile;
  const int64_t parts = std::max<int64_t>(wanted_blocks / std::max<int64_t>(blocks, 1), 1);
  return std::max(divide_up(divide_up(length, parts), kTile) * kTile, shortest);
}

constexpr int64_t part_count(int64_t length, int64_t part) { return std::max<int64_t>(divide_up(length, part), 1); }

// The layout of a low-rank factor in memory.
enum class Factor {
  kRankFirst,  // A [r, k]
  kRankLast,   // B [n, r]
};

// parts [part_count(columns, part), tokens, rank]; `part` is a length in columns, as from part_length.
template <typename T>
void adapter_shrink(const T* x, const T* factor, Factor layout, float* parts, int64_t tokens, int64_t columns,
                    int64_t rank, int64_t part, float scaling, const Dropout& dropout, Stream stream);

// y [tokens, columns]
template <typename T>
void adapter_expand(const float* u, const T* factor, Factor layout, T* y, int64_t tokens, int64_t columns, int64_t rank,
                    float scaling, const Dropout& dropout, Stream stream);

// parts [part_count(tokens, part), ...] of a gradient laid out as the factor; `part` is a length in tokens.
template <typename T>
void adapter_factor_gradient(const float* u, const T* x, Factor layout, float* parts, int64_t tokens, int64_t columns,
                             int64_t rank, int64_t part, float scaling, const Dropout& dropout, Stream stream);

// du_parts [divide_up(n, kGradientColumns), tokens, rank], db_parts [part_count(tokens, part), n, rank]
constexpr int64_t kGradientColumns = 256;
constexpr int64_t kGradientRank = 32;  // the largest rank that adapter_output_gradients supports
template <typename T>
void adapter_output_gradients(const T* dy, const float* u, const T* b, float* du_parts, float* db_parts, int64_t tokens,
                              int64_t columns, int64_t rank, int64_t part, float scaling, Stream stream);

}  // namespace megatron_step
