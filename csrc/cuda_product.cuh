// A warp's product of 16 x 16 parts of tiles, summed in float. 16-bit types use the tensor cores; float is multiplied
// element by element, with the outputs in the same places.
//     c[i, j] += sum_k left[i, k] right[k, j]        i, j, k < 16
#pragma once

#include "cuda_tile.cuh"

namespace megatron_step {

enum class Side { kLeft, kRight };

// The orientation of an operand in a tile: the summed index runs along a row, or from row to row.
enum class Sum { kAlongRow, kFromRowToRow };

// A lane's share of an operand: the words that a matrix load returns and a matrix product takes.
template <typename T>
struct Operand {
  uint32_t words[4];
};

// In float: the address of element (0, 0) in shared memory, and the strides of the two indices.
template <>
struct Operand<float> {
  const float* origin;
  int outer_step, sum_step;
};

__device__ __forceinline__ int lane() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp() { return threadIdx.x / 32; }

// The operand whose other index (i or j) begins at `outer` and whose summed index begins at `k`.
template <Side SIDE, Sum SUM, typename T, int ROWS, int COLUMNS>
__device__ __forceinline__ Operand<T> load_operand(const Tile<T, ROWS, COLUMNS>& tile, int outer, int k) {
  const int row = SUM == Sum::kAlongRow ? outer : k, column = SUM == Sum::kAlongRow ? k : outer;
  if constexpr (sizeof(T) == 2) {
    // Each lane addresses a row of one of four 8 x 8 matrices, in the order of the product.
    constexpr bool down_first = (SIDE == Side::kLeft) == (SUM == Sum::kAlongRow);
    const int first = lane() / 8 % 2 * 8, second = lane() / 16 * 8;
    Operand<T> operand;
    load_matrices<SUM == Sum::kFromRowToRow>(
        operand.words,
        tile.at(row + lane() % 8 + (down_first ? first : second), column + (down_first ? second : first)));
    return operand;
  } else {
    constexpr int stride = Tile<T, ROWS, COLUMNS>::kStride;
    return {tile.at(row, column), SUM == Sum::kAlongRow ? stride : 1, SUM == Sum::kAlongRow ? 1 : stride};
  }
}

// A lane's eight of the 16 x 16 outputs: value e of half h is at output_row(e), output_column(h, e).
using Outputs = float[2][4];
__device__ __forceinline__ int output_row(int e) { return lane() / 4 + e / 2 * 8; }
__device__ __forceinline__ int output_column(int h, int e) { return 8 * h + lane() % 4 * 2 + e % 2; }

template <typename T>
__device__ __forceinline__ void multiply(Outputs& c, const Operand<T>& left, const Operand<T>& right) {
  if constexpr (sizeof(T) == 2) {
    multiply_matrices<T>(c[0], left.words, right.words[0], right.words[1]);
    multiply_matrices<T>(c[1], left.words, right.words[2], right.words[3]);
  } else {
    // Summed separately, then added: this reduces the rounding error of a long sum.
    Outputs sums = {};
#pragma unroll 2
    for (int k = 0; k < 16; ++k) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          sums[h][e] += left.origin[output_row(e) * left.outer_step + k * left.sum_step] *
                        right.origin[output_column(h, e) * right.outer_step + k * right.sum_step];
        }
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        c[h][e] += sums[h][e];
      }
    }
  }
}

// Calls f(row, column, value) for this lane's outputs.
template <typename Function>
__device__ __forceinline__ void for_each_output(const Outputs& c, Function f) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      f(output_row(e), output_column(h, e), c[h][e]);
    }
  }
}

}  // namespace megatron_step
