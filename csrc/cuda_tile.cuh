// Tiles of matrices in shared memory: copying them from global memory, and masking them.
#pragma once

#include "adapter_kernels.h"
#include "cuda_device.cuh"

namespace megatron_step {

constexpr int kThreads = 128;  // threads of a block: four warps
constexpr int kWarps = kThreads / 32;
// Blocks that must fit into a multiprocessor. In float this leaves a thread 128 registers, which avoids spills; for 16-bit
// types, the compiler's own choice (0) avoids spills.
template <typename T>
constexpr int kMinimumBlocks = sizeof(T) == 2 ? 0 : 4;

// A row-major matrix in global memory.
template <typename T>
struct Matrix {
  const T* data;
  int64_t rows, columns;
  bool aligned;  // rows begin at multiples of 16 bytes

  Matrix(const T* data, int64_t rows, int64_t columns)
      : data(data),
        rows(rows),
        columns(columns),
        aligned(reinterpret_cast<uintptr_t>(data) % 16 == 0 && columns % (16 / static_cast<int64_t>(sizeof(T))) == 0) {}
};

// A tile of ROWS x COLUMNS in shared memory. Each row is padded by 16 bytes, so that the eight rows of a matrix load are
// in different banks.
template <typename T, int ROWS, int COLUMNS>
struct Tile {
  static constexpr int kChunk = 16 / sizeof(T);  // elements of one copy
  static constexpr int kStride = COLUMNS + kChunk;
  static constexpr int kElements = ROWS * kStride;
  static_assert(COLUMNS % kChunk == 0);

  T* data;

  __device__ T* at(int row, int column) const { return data + row * kStride + column; }

  // Calls f(row, column) for the first element of each of this thread's chunks, the same chunks at each call.
  template <typename Function>
  __device__ void for_each_chunk(Function f) const {
    constexpr int chunks = COLUMNS / kChunk;
    for (int i = threadIdx.x; i < ROWS * chunks; i += kThreads) {
      f(i / chunks, i % chunks * kChunk);
    }
  }

  // Begins to copy the part of a matrix at (first_row, first_column), with zeros beyond the matrix's edges.
  __device__ void load(const Matrix<T>& matrix, int64_t first_row, int64_t first_column) const {
    for_each_chunk([&](int row, int column) {
      const int64_t left = first_row + row < matrix.rows ? matrix.columns - first_column - column : 0;
      const int count = left <= 0 ? 0 : (left < kChunk ? static_cast<int>(left) : kChunk);
      const T* from = count == 0 ? matrix.data : matrix.data + (first_row + row) * matrix.columns + first_column + column;
      T* to = at(row, column);
      if (matrix.aligned) {
        copy_async(to, from, count * static_cast<int>(sizeof(T)));
      } else {
        for (int e = 0; e < kChunk; ++e) {
          to[e] = e < count ? from[e] : T(0.0f);
        }
      }
    });
  }

  // Copies the part of a float matrix [rows, columns] at (first_row, first_column), rounded, with zeros beyond the edges.
  __device__ void load_rounded(const float* matrix, int64_t rows, int64_t columns, int64_t first_row,
                               int64_t first_column) const {
    for (int i = threadIdx.x; i < ROWS * COLUMNS; i += kThreads) {
      const int64_t row = first_row + i / COLUMNS, column = first_column + i % COLUMNS;
      *at(i / COLUMNS, i % COLUMNS) = T(row < rows && column < columns ? matrix[row * columns + column] : 0.0f);
    }
  }

  // Masks the chunks that this thread has copied. Call it after the wait for the copies and before the barrier.
  __device__ void drop(const Dropout& dropout, int64_t first_row, int64_t first_column) const {
    if (dropout.threshold == 0) {
      return;
    }
    for_each_chunk([&](int row, int column) {
      Chunk& chunk = *reinterpret_cast<Chunk*>(at(row, column));
      for (int e = 0; e < kChunk; ++e) {
        const float mask = dropout.mask(first_row + row, first_column + column + e);
        chunk.values[e] = T(static_cast<float>(chunk.values[e]) * mask);
      }
    });
  }

 private:
  struct alignas(16) Chunk {
    T values[kChunk];
  };
};

}  // namespace megatron_step
